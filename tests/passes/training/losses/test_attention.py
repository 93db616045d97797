from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.losses import make_loss
from bitlower.passes.training import Step

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
FUTURE = torch.ones(4, 4).triu(1).bool()
LOWEST = torch.finfo(torch.float32).min
MakeStep = Callable[..., Step]


def scores(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(1 + index) * torch.randn(2, 3, 4, 4, generator=generator) for index in range(2)]


def reference(student: list[torch.Tensor], teacher: list[torch.Tensor], causal: bool) -> torch.Tensor:
    """Pair by pair, in float64."""
    blocks = []
    for ours, theirs in zip(student, teacher, strict=True):
        errors = [
            (ours[row, head, i, j].double() - theirs[row, head, i, j].double()) ** 2
            for row in range(2) for head in range(3) for i in range(4) for j in range(4)
            if MASK[row, i] and MASK[row, j] and not (causal and j > i)
        ]  # fmt: skip
        blocks.append(sum(errors) / len(errors))
    return sum(blocks) / len(blocks)  # type: ignore[return-value]


@pytest.mark.parametrize("shut", [None, float("-inf"), LOWEST])
def test_value_and_gradient_are_those_of_the_definition(make_step: MakeStep, shut: float | None) -> None:
    """A mask adds ``shut`` to the scores of what comes later, of both models."""
    added = torch.zeros(4, 4) if shut is None else torch.zeros(4, 4).masked_fill(FUTURE, shut)
    student = [value.requires_grad_() for value in scores(0)]
    step = make_step(MASK, attention=([value + added for value in student], [value + added for value in scores(1)]))
    loss = make_loss("attention").value(step, {})
    wide = [value.detach().double().requires_grad_() for value in student]
    expected = reference(wide, scores(1), causal=shut is not None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(student, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padding_never_counts(make_step: MakeStep, garbage: float) -> None:
    there = (MASK.unsqueeze(2) & MASK.unsqueeze(1)).unsqueeze(1)
    clean = make_loss("attention").value(make_step(MASK, attention=(scores(0), scores(1))), {})
    dirty = [[value.masked_fill(~there, garbage) for value in scores(seed)] for seed in (0, 1)]
    assert torch.equal(make_loss("attention").value(make_step(MASK, attention=(dirty[0], dirty[1])), {}), clean)


def test_a_model_without_attention_is_refused(make_step: MakeStep) -> None:
    with pytest.raises(BitlowerError, match="the loss 'attention' compares values of repeated blocks: the model has"):
        make_loss("attention").value(make_step(MASK), {})
