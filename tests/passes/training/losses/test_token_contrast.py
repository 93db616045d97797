from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError, Program
from bitlower.passes._machinery.losses import make_loss
from bitlower.passes.training import Step
from bitlower.passes.training._memory_bank import MemoryBank

VOCABULARY, CHANNELS = 12, 5
IDS = torch.tensor([[3, 7, 3, 9, 1], [7, 2, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
MakeStep = Callable[..., Step]


def values(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(seed))


def half_full() -> dict[str, torch.Tensor]:
    """A bank that has met the ids 0 to 5."""
    memory = MemoryBank.empty(VOCABULARY, CHANNELS)
    memory["rows"][:6] = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(7))
    memory["seen"][:6] = True
    return memory


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b / (a.norm() * b.norm())


def reference(
    student: torch.Tensor, teacher: torch.Tensor, memory: dict[str, torch.Tensor], negatives: str, momentum: float,
    temperature: float,
) -> torch.Tensor:  # fmt: skip
    """Equations 3 to 5 token by token, with all the negatives that there are; of float64 tensors."""
    q, bank = {}, memory["rows"].double()
    tokens = [tuple(place) for place in MASK.nonzero().tolist()]
    for row, i in tokens:
        own, token = student[row, i], int(IDS[row, i])
        past = bank[token] if memory["seen"][token] else own.detach()
        q[row, i] = momentum * past + (1 - momentum) * own
    total = torch.zeros((), dtype=torch.float64)
    for row, i in tokens:
        others = [j for r, j in tokens if r == row and IDS[row, j] != IDS[row, i]]
        known = [v for v in range(VOCABULARY) if memory["seen"][v] and v != IDS[row, i]]
        h = teacher[row]
        there, back = {
            "positions": ([h[j] for j in others], [q[row, j] for j in others]),
            "quantized": ([q[row, j] for j in others], [q[row, j] for j in others]),
            "vocabulary": ([bank[v] for v in known], [bank[v] for v in known]),
        }[negatives]
        own = torch.exp(cosine(q[row, i], h[i]) / temperature)
        total = total - torch.log(own / (own + sum(torch.exp(cosine(q[row, i], k) / temperature) for k in there)))
        total = total - torch.log(own / (own + sum(torch.exp(cosine(h[i], k) / temperature) for k in back)))
    return total / len(tokens)


@pytest.mark.parametrize("negatives", ["positions", "quantized", "vocabulary"])
@pytest.mark.parametrize(("momentum", "temperature"), [(0.5, 0.1), (0.9, 1.0), (0.0, 0.5)])
def test_value_and_gradient_are_those_of_the_equations(
    make_step: MakeStep, negatives: str, momentum: float, temperature: float
) -> None:
    loss = make_loss("token-contrast", {"negatives": negatives, "momentum": momentum, "temperature": temperature})
    student, memory = values(0).requires_grad_(), half_full()
    found = loss.value(make_step(MASK, IDS, ([student], [values(1)])), memory)
    wide = values(0).double().requires_grad_()
    expected = reference(wide, values(1).double(), half_full(), negatives, momentum, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    assert student.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_what_differences_say(make_step: MakeStep) -> None:
    """In the bank's past there is none: a small change of the input moves ``q`` by ``1 − momentum`` of it."""
    loss, teacher, known = make_loss("token-contrast", {"temperature": 0.7}), values(1), half_full()
    known["seen"][:] = True
    student = values(0).requires_grad_()
    loss.value(make_step(MASK, IDS, ([student], [teacher]), training=False), known).backward()
    for index in itertools.product(range(2), range(3), range(2)):
        step = torch.zeros_like(student, dtype=torch.float64)
        step[index] = 1e-4
        ends = [
            reference(student.detach().double() + sign * step, teacher.double(), known, "positions", 0.5, 0.7)
            for sign in (1, -1)
        ]
        slope = float(ends[0] - ends[1]) / 2e-4
        assert float(student.grad[index]) == pytest.approx(slope, rel=1e-3, abs=1e-5)  # type: ignore[index]


def test_the_bank_holds_the_mean_of_what_was_met(make_step: MakeStep) -> None:
    memory, student = half_full(), values(0)
    before = {name: tensor.clone() for name, tensor in memory.items()}
    make_loss("token-contrast", {"momentum": 0.8}).value(make_step(MASK, IDS, ([student], [values(1)])), memory)
    met: dict[int, list[np.ndarray]] = {}
    for row, i in MASK.nonzero().tolist():
        token, own = int(IDS[row, i]), student[row, i].double().numpy()
        past = before["rows"][token].double().numpy() if before["seen"][token] else own
        met.setdefault(token, []).append(0.8 * past + 0.2 * own)
    assert sorted(met) == [1, 2, 3, 7, 8, 9]
    for token in range(VOCABULARY):
        expected = np.mean(met[token], 0) if token in met else before["rows"][token].numpy()
        np.testing.assert_allclose(memory["rows"][token].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert bool(memory["seen"][token]) == (token in met or bool(before["seen"][token]))


def test_held_out_data_leave_the_bank_alone(make_step: MakeStep) -> None:
    memory = half_full()
    make_loss("token-contrast").value(make_step(MASK, IDS, ([values(0)], [values(1)]), training=False), memory)
    assert all(torch.equal(memory[name], tensor) for name, tensor in half_full().items())


@pytest.mark.parametrize("negatives", ["positions", "quantized", "vocabulary"])
@pytest.mark.parametrize("garbage", [1e20, float("nan"), float("inf")])
def test_padding_never_enters(make_step: MakeStep, negatives: str, garbage: float) -> None:
    loss, results = make_loss("token-contrast", {"negatives": negatives, "count": 2}), []
    for fill, token in ((None, 0), (garbage, 5)):
        student, teacher = values(0), values(1)
        if fill is not None:
            student, teacher = (value.masked_fill(~MASK.unsqueeze(-1), fill) for value in (student, teacher))
        student, memory = student.requires_grad_(), half_full()
        found = loss.value(make_step(MASK, IDS.masked_fill(~MASK, token), ([student], [teacher])), memory)
        found.backward()
        assert student.grad is not None
        assert not bool(student.grad[~MASK].any())
        results.append((found.item(), student.grad[MASK], memory["rows"]))
    (clean, *others), (dirty, *same) = results
    assert clean == dirty
    assert all(map(torch.equal, others, same))


@pytest.mark.parametrize("negatives", ["positions", "quantized"])
def test_the_same_token_is_never_a_negative(make_step: MakeStep, negatives: str) -> None:
    """A sequence of one token repeated has no negatives at all: nothing to tell apart, no loss."""
    ids, memory = torch.full((2, 5), 4), half_full()
    found = make_loss("token-contrast", {"negatives": negatives}).value(
        make_step(torch.ones(2, 5).bool(), ids, ([values(0)], [values(1)])), memory
    )
    assert float(found) == 0.0


def test_a_bank_that_knows_nothing_has_no_negatives(make_step: MakeStep) -> None:
    memory = MemoryBank.empty(VOCABULARY, CHANNELS)
    loss = make_loss("token-contrast", {"negatives": "vocabulary"})
    assert float(loss.value(make_step(MASK, IDS, ([values(0)], [values(1)])), memory)) == 0.0
    assert float(loss.value(make_step(MASK, IDS, ([values(0)], [values(1)])), memory)) > 0.0


@pytest.mark.parametrize("negatives", ["positions", "vocabulary"])
def test_as_many_negatives_are_drawn_as_asked_for(make_step: MakeStep, negatives: str) -> None:
    """All vectors are equal, so that every cosine is 1: a token with n negatives costs twice ``log(1 + n)``."""
    ids, mask = torch.arange(8).view(1, 8), torch.ones(1, 8).bool()
    same, memory = torch.ones(1, 8, CHANNELS), MemoryBank.empty(20, CHANNELS)
    memory["rows"][10:] = 1.0
    memory["seen"][10:] = True
    for count, there in ((1, 1), (3, 3), (50, 7 if negatives == "positions" else 10)):
        loss = make_loss("token-contrast", {"negatives": negatives, "count": count})
        found = loss.value(make_step(mask, ids, ([same], [same]), training=False), memory)
        assert float(found) == pytest.approx(2 * math.log(1 + there), rel=1e-5)


def test_the_draw_depends_on_the_step_alone(make_step: MakeStep) -> None:
    loss, pair = make_loss("token-contrast", {"count": 1}), ([values(0)], [values(1)])
    found = [float(loss.value(make_step(MASK, IDS, pair, seed=seed), half_full())) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len(set(found)) > 2


def test_the_bank_fits_the_model(bert: Any, family: Callable[[str], Program]) -> None:
    memory = make_loss("token-contrast").memory(bert(layers=2)[1])
    assert (memory["rows"].shape, memory["seen"].shape) == ((100, 32), (100,))
    assert not bool(memory["seen"].any())
    assert make_loss("token-contrast").memory(family("gpt2"))["rows"].shape == (60, 32)


def test_a_model_without_token_ids_is_refused(tiny_program: Program) -> None:
    with pytest.raises(BitlowerError, match=r"the loss 'token-contrast' needs token ids \(`input_ids`\) and repeated"):
        make_loss("token-contrast").memory(tiny_program)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [("count", 0, "int of 1 or more"), ("momentum", 1.0, "float from 0 to below 1"), ("momentum", -0.1, "float from 0"),
     ("temperature", 0.0, "float from above 0"), ("temperature", 101.0, "float from above 0 to 100")],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name: str, value: float, hint: str) -> None:
    with pytest.raises(BitlowerError, match=f"loss 'token-contrast': parameter '{name}' takes {hint}"):
        make_loss("token-contrast", {name: value})
