"""The running second moment against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.ir.token_weights import WEIGHTINGS, token_weights
from bitlower.passes.rounding import _hessian
from bitlower.passes.rounding._hessian import Hessian


def tokens(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.reshape(-1, shape[-1])[0] *= 100  # an attention sink
    return x


def expected(x: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1]).numpy().astype(np.float64)
    return (rows * weights[:, None]).T @ rows / (weights > 0).sum()


@pytest.mark.parametrize("columns", [3, 512, 700])
@settings(max_examples=15)
@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_it_is_the_mean_however_the_tokens_come(columns: int, parts: list[int]) -> None:
    x = tokens((sum(parts), columns))
    hessian = Hessian(columns)
    for part in x.split(parts):
        hessian.add(part)
    assert hessian.tokens == sum(parts)
    matrix = hessian.matrix()
    want = expected(x, np.ones(len(x)))
    np.testing.assert_allclose(matrix, want, atol=1e-5 * np.abs(want).max())
    assert torch.equal(matrix, matrix.T)


def test_more_may_be_added_after_it_was_read() -> None:
    x = tokens((2, 10, 600))
    once, twice = Hessian(600), Hessian(600)
    once.add(x)
    twice.add(x[0])
    twice.matrix()
    twice.add(x[1])
    np.testing.assert_allclose(once.matrix(), twice.matrix(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_long_batches_are_taken_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hessian, "_CHUNK", chunk * 8)
    x = tokens((4, 5, 8))
    hessian = Hessian(8)
    hessian.add(x)
    np.testing.assert_allclose(hessian.matrix(), expected(x, np.ones(20)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        ("none", lambda n: np.ones_like(n)),
        ("unit-norm", lambda n: 1 / n),
        ("root-norm", lambda n: 1 / np.sqrt(n)),
        ("clipped-norm", lambda n: np.minimum(1, 2 * np.sort(n)[(len(n) - 1) // 2] / n)),
    ],
)
def test_weightings_are_their_formulas(weighting: str, formula) -> None:
    x = tokens((3, 20, 16))
    hessian = Hessian(16, weighting=weighting)
    hessian.add(x)
    norms = x.reshape(-1, 16).numpy().astype(np.float64).__pow__(2).sum(1)
    np.testing.assert_allclose(hessian.matrix(), expected(x, formula(norms)), rtol=1e-4, atol=1e-4)


def test_every_weighting_is_tested() -> None:
    assert set(WEIGHTINGS) == {"none", "unit-norm", "root-norm", "clipped-norm"}
    assert all(function.__doc__ for function in WEIGHTINGS.values())


def test_unit_norms_forget_the_norm_of_a_token() -> None:
    x = tokens((30, 8))
    one, other = Hessian(8, weighting="unit-norm"), Hessian(8, weighting="unit-norm")
    one.add(x)
    other.add(x * torch.logspace(-3, 3, 30)[:, None])
    np.testing.assert_allclose(one.matrix(), other.matrix(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_padding_is_left_out_whatever_it_holds(weighting: str) -> None:
    x = tokens((2, 6, 8))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    x[1, 4] = torch.nan
    x[1, 5] = 1e30
    padded, plain = Hessian(8, weighting=weighting), Hessian(8, weighting=weighting)
    padded.add(x, mask)
    plain.add(x[mask == 1])
    assert padded.tokens == plain.tokens == 10
    np.testing.assert_allclose(padded.matrix(), plain.matrix(), rtol=1e-6)


def test_given_weights_multiply() -> None:
    x = tokens((12, 8))
    weights = torch.rand(12, generator=torch.Generator().manual_seed(2)) + 0.1
    hessian = Hessian(8, weighting="unit-norm")
    hessian.add(x, weights)
    norms = (x.double() ** 2).sum(1).numpy()
    np.testing.assert_allclose(hessian.matrix(), expected(x, weights.numpy() / norms), rtol=1e-4, atol=1e-5)


def test_dead_columns_and_tokens_of_zeros() -> None:
    x = tokens((12, 8))
    x[:, 5] = 0
    x[3] = 0
    hessian = Hessian(8, weighting="unit-norm")
    hessian.add(x)
    assert hessian.tokens == 11
    assert hessian.dead.nonzero().flatten().tolist() == [5]
    assert torch.isfinite(hessian.matrix()).all()


def test_half_precision_is_summed_in_single() -> None:
    x = tokens((5000, 4)).clamp(-3, 3).bfloat16()
    hessian = Hessian(4)
    hessian.add(x)
    np.testing.assert_allclose(hessian.matrix(), expected(x.float(), np.ones(5000)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [8, 600])
def test_bfloat16_is_exact_for_rounded_inputs(columns: int) -> None:
    """So that it is positive semidefinite, and the same whether or not the CPU has such products."""
    x = tokens((50, columns))
    before = torch.backends.mkldnn.matmul.fp32_precision
    hessian = Hessian(columns, precision="bfloat16")
    hessian.add(x)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    want = expected(x.bfloat16().float(), np.ones(50))
    np.testing.assert_allclose(hessian.matrix(), want, atol=1e-6 * np.abs(want).max())
    assert np.abs(want - expected(x, np.ones(50))).max() > 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.ones(2, 7), None, r"dense: inputs \[2, 7\] do not fit a Hessian of 8 columns"),
        (torch.ones(2, 8), torch.ones(3), r"dense: inputs \[2, 8\] with weights \[3\] do not fit"),
        (torch.full((2, 8), torch.nan), None, "dense: its calibration inputs hold NaN, Inf"),
        (torch.full((2, 8), torch.inf), None, "dense: its calibration inputs hold NaN, Inf"),
        (torch.full((2, 8), 1e25), None, "square overflows"),
        (torch.ones(2, 8), torch.tensor([1.0, -1.0]), "a token weight is negative"),
        (torch.ones(2, 8), torch.tensor([1.0, torch.nan]), "a token weight is negative or not finite"),
    ],
)
def test_bad_inputs_are_named(x: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        Hessian(8, name="dense").add(x, weights)


def test_a_layer_that_no_token_reaches_is_named() -> None:
    hessian = Hessian(8, name="dense")
    hessian.add(torch.zeros(0, 8))
    hessian.add(torch.ones(3, 8), torch.zeros(3))
    with pytest.raises(BitlowerError, match="dense was never reached by calibration data"):
        hessian.matrix()


def test_an_unknown_weighting_is_named() -> None:
    with pytest.raises(BitlowerError, match="did you mean 'unit-norm'"):
        Hessian(8, weighting="unit-norms")


def test_token_weights_have_a_mean_of_one() -> None:
    targets = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 100.0]])
    norms = targets.square().sum(1)
    torch.testing.assert_close(token_weights(norms, "none"), torch.tensor([4 / 3, 0, 4 / 3, 4 / 3]))
    relative = torch.tensor([1 / 25, 0, 1, 1e-4])
    torch.testing.assert_close(token_weights(norms, "unit-norm"), relative / relative.mean())
    assert torch.equal(token_weights(torch.zeros(3), "unit-norm"), torch.zeros(3))
