"""Hadamard matrices have entries ±1 and orthogonal rows; the bases made of them are orthogonal and seeded."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from bitlower.passes.outliers._hadamard import hadamard, paley, random_hadamard, random_orthogonal


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 64, 200, 384, 576, 768, 896, 1536, 2560, 3072])
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    found = matrix.numpy().astype(np.float64)  # whole numbers, exact; products of int64 are many times slower
    assert set(np.unique(found)) <= {-1, 1}
    np.testing.assert_array_equal(found @ found.T, order * np.eye(order))


def test_powers_of_two_are_sylvesters() -> None:
    np.testing.assert_array_equal(hadamard(64).numpy(), scipy.linalg.hadamard(64))


@pytest.mark.parametrize("order", [3, 5, 6, 18, 27, 30, 92])
def test_other_orders_are_not_made_up(order: int) -> None:
    assert hadamard(order) is None
    assert random_hadamard(order, torch.Generator()) is None


def test_the_core_is_paleys() -> None:
    assert torch.equal(hadamard(576), torch.kron(hadamard(16), paley(36)))


def test_bases_are_orthogonal_and_follow_the_seed() -> None:
    for make, order in ((random_hadamard, 24), (random_orthogonal, 18)):
        first, again, other = (make(order, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        torch.testing.assert_close(first @ first.T, torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_an_outlier_is_spread_evenly() -> None:
    basis = random_hadamard(576, torch.Generator().manual_seed(0))
    x = torch.zeros(576, dtype=torch.float64)
    x[507] = 24.0
    torch.testing.assert_close((x @ basis).abs(), torch.ones(576, dtype=torch.float64))
