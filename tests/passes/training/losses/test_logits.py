from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.losses import make_loss

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(6, 9, generator=GENERATOR) for _ in range(2))


def rows(temperature: float, student: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
    return make_loss("logits", {"temperature": temperature}).rows(student, teacher, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_divergence_from_the_teacher(temperature: float) -> None:
    ours, wanted = (softmax(x.double().numpy() / temperature, -1) for x in (STUDENT, TEACHER))
    expected = temperature**2 * rel_entr(wanted, ours).sum(-1)
    np.testing.assert_allclose(rows(temperature, STUDENT, TEACHER).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_the_difference_of_the_distributions(temperature: float) -> None:
    """``∂/∂z = T · (q − p)``, by hand."""
    student = STUDENT.clone().requires_grad_()
    rows(temperature, student, TEACHER).sum().backward()
    ours, wanted = (softmax(x.double().numpy() / temperature, -1) for x in (STUDENT, TEACHER))
    np.testing.assert_allclose(student.grad, temperature * (ours - wanted), atol=1e-5)  # type: ignore[arg-type]


def test_the_soft_cross_entropy_has_the_same_gradient() -> None:
    """QuantGPT's distillation loss: ``−Σ p log q``."""
    student = STUDENT.double().requires_grad_()
    (-(TEACHER.double().softmax(-1) * student.log_softmax(-1)).sum(-1)).sum().backward()
    mine = STUDENT.clone().requires_grad_()
    rows(1.0, mine, TEACHER).sum().backward()
    torch.testing.assert_close(mine.grad, student.grad.float(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_the_teacher_itself_costs_nothing() -> None:
    torch.testing.assert_close(rows(2.0, TEACHER, TEACHER), torch.zeros(6), atol=1e-5, rtol=0)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[200.0, -200.0]]).requires_grad_()
    value = rows(1.0, student, torch.tensor([[-200.0, 200.0]]))
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(400.0)
    assert student.grad is not None
    assert student.grad.tolist() == [[1.0, -1.0]]


def test_one_value_is_compared_as_such() -> None:
    value = rows(3.0, torch.tensor([[1.5], [2.0]]), torch.tensor([[1.0], [-1.0]]))
    assert value.tolist() == [0.25, 9.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_must_be_a_number_above_zero(temperature: float) -> None:
    with pytest.raises(BitlowerError, match=r"'temperature' takes float from above 0 to 1000"):
        make_loss("logits", {"temperature": temperature})
