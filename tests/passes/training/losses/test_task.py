from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.losses import make_loss

LOGITS = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([3, 0, 1, 1, 2])


def rows(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return make_loss("task").rows(student, None, labels)  # type: ignore[attr-defined]


def test_classes_have_the_cross_entropy() -> None:
    student = LOGITS.clone().requires_grad_()
    value = rows(student, LABELS)
    wide = LOGITS.double().numpy()
    np.testing.assert_allclose(value.detach().numpy(), -log_softmax(wide, -1)[np.arange(5), LABELS.numpy()], rtol=1e-5)
    value.sum().backward()
    np.testing.assert_allclose(
        student.grad,  # type: ignore[arg-type]
        softmax(wide, -1) - np.eye(4)[LABELS.numpy()],
        atol=1e-6,
    )


def test_values_have_the_squared_error() -> None:
    student = torch.tensor([[1.0], [4.5]], requires_grad=True)
    value = rows(student, torch.tensor([3.0, 5.0]))
    assert value.tolist() == [4.0, 0.25]
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[-4.0], [-1.0]]


def test_it_needs_labels_and_no_teacher() -> None:
    assert make_loss("task").needs == {"labels"}


@pytest.mark.parametrize("label", [4, 17, -1])
def test_a_label_that_the_head_does_not_have_is_named(label: int) -> None:
    labels = torch.tensor([0, label, 1, 2, 3])
    with pytest.raises(
        BitlowerError, match=rf"the label {label} does not fit a head of 4 classes; labels run from 0 to 3"
    ):
        rows(LOGITS, labels)


def test_values_do_not_fit_a_head_of_classes() -> None:
    with pytest.raises(BitlowerError, match=r"labels are numbers, but the head gives 4 values a text"):
        rows(LOGITS, torch.rand(5))
