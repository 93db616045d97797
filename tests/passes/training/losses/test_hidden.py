from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.losses import make_loss
from bitlower.passes.training import Step

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
MakeStep = Callable[..., Step]


def values(seed: int, blocks: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(1 + index) * torch.randn(3, 4, 6, generator=generator) for index in range(blocks)]


def reference(student: list[torch.Tensor], teacher: list[torch.Tensor], unit_norm: bool) -> torch.Tensor:
    """Token by token, in float64."""
    blocks = []
    for ours, theirs in zip(student, teacher, strict=True):
        errors = []
        for row, column in MASK.nonzero().tolist():
            a, b = ours[row, column].double(), theirs[row, column].double()
            errors.append(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (b @ b if unit_norm else len(b)))
        blocks.append(sum(errors) / len(errors))
    return sum(blocks) / len(blocks)  # type: ignore[return-value]


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("tokens", ["mean", "unit-norm"])
def test_value_and_gradient_are_those_of_the_definition(make_step: MakeStep, tokens: str, layers: str) -> None:
    student, teacher = [value.requires_grad_() for value in values(0)], values(1)
    step = make_step(MASK, hidden=(student, teacher))
    loss = make_loss("hidden", {"tokens": tokens, "layers": layers}).value(step, {})
    wide = [value.detach().double().requires_grad_() for value in student]
    chosen = slice(None) if layers == "all" else slice(-1, None)
    expected = reference(wide[chosen], teacher[chosen], tokens == "unit-norm")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(student, wide, strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", ["mean", "unit-norm"])
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padding_never_counts(make_step: MakeStep, tokens: str, garbage: float) -> None:
    loss, teacher = make_loss("hidden", {"tokens": tokens}), values(1)
    clean = loss.value(make_step(MASK, hidden=(values(0), teacher)), {})
    dirty = [[value.masked_fill(~MASK.unsqueeze(-1), garbage) for value in values(seed)] for seed in (0, 1)]
    dirty[0] = [value.requires_grad_() for value in dirty[0]]
    found = loss.value(make_step(MASK, hidden=(dirty[0], dirty[1])), {})
    assert torch.equal(found, clean)
    found.backward()
    assert all(not bool(value.grad[~MASK].any()) for value in dirty[0])  # type: ignore[index]


def test_unit_norm_is_blind_to_the_size_of_a_token(make_step: MakeStep) -> None:
    loss, (student,), (teacher,) = make_loss("hidden", {"tokens": "unit-norm"}), values(0, 1), values(1, 1)
    factor = torch.ones(3, 4, 1)
    factor[0, 2] = 1000.0
    plain = loss.value(make_step(MASK, hidden=([student], [teacher])), {})
    scaled = loss.value(make_step(MASK, hidden=([student * factor], [teacher * factor])), {})
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [([], [], "the model has none"), (values(0, 2), values(1, 3), "student and teacher have"),
     (values(0, 1), [torch.zeros(3, 4, 5)], r"\(3, 4, 6\)")],
)  # fmt: skip
def test_values_that_do_not_go_together_are_refused(
    make_step: MakeStep, student: Any, teacher: Any, message: str
) -> None:
    with pytest.raises(BitlowerError, match=f"the loss 'hidden' compares values of repeated blocks: .*{message}"):
        make_loss("hidden").value(make_step(MASK, hidden=(student, teacher)), {})
