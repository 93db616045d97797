"""Factors against numpy's, and what happens to Hessians that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError
from bitlower.passes.rounding._gptq_factor import cholesky_, factorize


def moment(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("columns", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_is_that_of_numpy(columns: int, dtype: torch.dtype) -> None:
    matrix = (moment(columns, 2 * columns) + torch.eye(columns)).to(dtype)
    expected = np.linalg.cholesky(matrix.double().numpy()).T
    assert cholesky_(matrix)
    np.testing.assert_allclose(matrix.triu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", [3, 200])
def test_cholesky_refuses_what_is_not_positive_definite(where: int) -> None:
    matrix = moment(256, 600)
    matrix[where, where] = -1
    assert not cholesky_(matrix)


@pytest.mark.parametrize("order", ["none", "full", "grouped"])
def test_the_factor_is_that_of_the_damped_hessian(order: str) -> None:
    hessian = moment(150, 400)
    factor = factorize(hessian, damping=0.05, order=order, group=30)
    positions = factor.positions
    damped = hessian.double() + 0.05 * hessian.diagonal().mean() * torch.eye(150)
    product = factor.upper.T.double() @ (factor.pivots.double()[:, None] * factor.upper)
    np.testing.assert_allclose(product, damped[positions][:, positions], atol=1e-5)
    assert sorted(positions.tolist()) == list(range(150))
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.note == ""


def test_orders_are_those_that_they_say() -> None:
    hessian = torch.tensor([1.0, 5.0, 9.0, 2.0, 3.0, 7.0]).diag()

    def solved(order: str, group: int = 0) -> list[int]:
        return factorize(hessian, order=order, group=group).positions.flip(0).tolist()

    assert solved("none") == [0, 1, 2, 3, 4, 5]
    assert solved("full", 2) == [2, 5, 1, 4, 3, 0]
    assert solved("grouped", 2) == [2, 3, 5, 4, 1, 0]
    assert solved("grouped") == solved("full")


@pytest.mark.parametrize("order", ["none", "full"])
def test_the_loss_of_an_error_is_its_own_under_the_hessian(order: str) -> None:
    hessian = moment(700, 1500)
    error = torch.randn(700, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("ir,ij,jr->r", error.double(), hessian.double(), error.double())
    np.testing.assert_allclose(factorize(hessian, order=order).loss(error), expected, rtol=1e-4)


def test_a_loss_of_zero_does_not_fall_below_it_by_rounding() -> None:
    """Errors that no token sees: their loss is what is left when the damping's share is taken off again."""
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.linalg.qr(inputs.T)[0]
    error = torch.randn(64, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error -= seen @ (seen.T @ error)
    loss = factorize((inputs.T @ inputs / 4).float()).loss(error.float())
    assert float(loss.max()) < 1e-4
    assert float(loss.min()) >= 0


def test_a_singular_hessian_is_damped_until_it_is_not_and_the_layer_is_named() -> None:
    hessian = moment(60, 5)
    factor = factorize(hessian, damping=0.0, name="encoder.dense")
    assert factor.damping >= 1e-4
    assert factor.note.startswith("encoder.dense: damping raised from 0 to ")
    assert torch.isfinite(factor.upper).all()
    assert not factorize(hessian, damping=0.01).note


def test_damping_rises_by_tens() -> None:
    """An eigenvalue of −0.004 of the mean diagonal takes 10⁻², after 10⁻⁴ and 10⁻³."""
    vectors = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.ones(40, dtype=torch.float64)
    values[0] = -0.004
    hessian = (vectors * values) @ vectors.T
    assert factorize(hessian.float(), damping=0.0).damping == pytest.approx(1e-2)


def test_an_ill_conditioned_hessian_is_factored_in_double_precision() -> None:
    """One column of 10⁷ times the energy of the others, which it determines but for a little."""
    inputs = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 0] = 3000 * inputs[:, 1:].sum(1) + 30 * inputs[:, 0]
    hessian = (inputs.T @ inputs / 400).float()
    factor = factorize(hessian, damping=1e-6)
    assert not factor.note
    damped = hessian.double() + factor.added * torch.eye(40)
    flipped = damped.flip(0, 1)
    exact = torch.linalg.cholesky(flipped).diagonal().square()
    np.testing.assert_allclose(factor.pivots, exact, rtol=1e-3)


def test_dead_columns_are_left_alone() -> None:
    hessian = moment(20, 100)
    hessian[[3, 7]] = 0
    hessian[:, [3, 7]] = 0
    factor = factorize(hessian)
    assert factor.dead.nonzero().flatten().tolist() == [3, 7]
    alive = hessian.diagonal()[~factor.dead]
    assert factor.added == pytest.approx(0.01 * alive.mean().item())


def indefinite() -> torch.Tensor:
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = -9
    return matrix


@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (torch.zeros(4, 4), 0.01, "dense was never reached by calibration data"),
        (torch.full((4, 4), torch.nan), 0.01, "dense: its Hessian holds NaN or Inf"),
        (torch.full((4, 4), torch.inf), 0.01, "dense: its Hessian holds NaN or Inf"),
        (torch.ones(4, 3), 0.01, "dense: a Hessian is square"),
        (torch.eye(4), -0.1, "dense: damping is a share from 0 to 1, not -0.1"),
        (torch.eye(4), 2.0, "dense: damping is a share from 0 to 1, not 2"),
        (torch.eye(4), float("nan"), "dense: damping is a share from 0 to 1, not nan"),
        (indefinite(), 0.01, "dense: its Hessian could not be factored, even with damping 1"),
    ],
)
def test_what_cannot_be_factored_is_named(hessian: torch.Tensor, damping: float, message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        factorize(hessian, damping=damping, name="dense")
