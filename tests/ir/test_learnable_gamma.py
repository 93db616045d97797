"""Module-wise dynamic scaling (QuantGPT, Tao et al. 2022, §3.3) against eq. 6 in float64 and eq. 7 written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec
from bitlower.ir.learnable import LearnableQuantizer, RangeSettings
from bitlower.ir.quantization.ranges import exact_loss, search_golden

PER_TENSOR, PER_ROW = Granularity.per_tensor(), Granularity.per_channel(0)


def quantizer(
    weight: torch.Tensor, bits: int, granularity: Granularity, share: float, gradient_scale: str = "none"
) -> LearnableQuantizer:
    """One whose range ends at ``share`` of the largest magnitude."""
    spec = QuantSpec(Grid(bits, restricted=True), granularity)
    largest = weight.abs().amax() if granularity == PER_TENSOR else weight.abs().amax(1, keepdim=True)
    scale, zero = spec.grid.qparams(-share * largest, share * largest)
    settings_ = RangeSettings(parametrization="gamma", gradient_scale=gradient_scale)  # type: ignore[arg-type]
    return LearnableQuantizer(spec, scale, zero, settings_, weight)


def definition(weight: torch.Tensor, gamma: torch.Tensor, bits: int) -> torch.Tensor:
    """Eq. 6 for rows ``[scales, elements]``: rounding and only rounding passes gradients straight through."""
    levels = 2 ** (bits - 1) - 1
    alpha = gamma * weight.detach().abs().mean(1, keepdim=True)
    u = torch.where(weight >= alpha, 1.0, torch.where(weight <= -alpha, -1.0, weight / alpha))
    rounded = torch.round(levels * u) / levels
    return alpha * (u + (rounded - u).detach())


def equation_7(weight: np.ndarray, gradient: np.ndarray, gamma: float, bits: int) -> tuple[float, np.ndarray]:
    """The gradients of gamma and of the weights that share it, one element at a time."""
    levels, mean = 2 ** (bits - 1) - 1, float(np.abs(weight).mean())
    alpha, by_gamma, by_weight = gamma * mean, 0.0, np.zeros_like(weight)
    for i, (w, g) in enumerate(zip(weight, gradient, strict=True)):
        if abs(w) < alpha:
            by_gamma += g * (np.round(levels * w / alpha) / levels - w / alpha)
            by_weight[i] = g
        else:
            by_gamma += g * np.sign(w)
    return mean * by_gamma, by_weight


@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.booleans(),
    share=st.floats(0.1, 1.2),
    size=st.tuples(st.integers(1, 5), st.integers(2, 40)),
)
@settings(max_examples=60)
def test_gradients_are_those_of_eq_7_and_of_the_definition(
    seed: int, bits: int, rows: bool, share: float, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    weight[0, 0] += 0.1  # never all zero
    module = quantizer(weight, bits, PER_ROW if rows else PER_TENSOR, share)
    own = weight.clone().requires_grad_()
    out = module(own)
    out.backward(gradient)
    assert module.range.grad is not None
    assert own.grad is not None

    wide, back = (x.double().reshape(-1, size[1] if rows else weight.numel()) for x in (weight, gradient))
    means = wide.abs().mean(1, keepdim=True)
    alpha = (module.scale.double() * (2 ** (bits - 1) - 1)).reshape(-1, 1)
    gamma = (alpha / means).requires_grad_()
    wide = wide.requires_grad_()
    expected = definition(wide, gamma, bits)
    unclear = _near_an_edge(wide.detach(), alpha, bits).reshape(size)
    _close(out.detach().double()[~unclear], expected.detach().reshape(size)[~unclear])
    if bool(unclear.any()):
        return
    expected.backward(back)
    assert gamma.grad is not None
    assert wide.grad is not None
    by_hand = [equation_7(w, g, float(y), bits) for w, g, y in zip(
        wide.detach().numpy(), back.numpy(), gamma.detach().flatten(), strict=True)]  # fmt: skip
    _close(gamma.grad.flatten(), torch.tensor([part[0] for part in by_hand]))
    _close(module.range.detach().double().flatten(), gamma.detach().flatten())
    scale = float((back.abs().sum(1, keepdim=True) * means).max())  # of the terms that are summed
    torch.testing.assert_close(module.range.grad.double().flatten(), gamma.grad.flatten(), rtol=1e-4, atol=1e-5 * scale)
    _close(own.grad.double(), wide.grad.reshape(size))
    _close(own.grad.double(), torch.tensor(np.stack([part[1] for part in by_hand])).reshape(size))


def _near_an_edge(weight: torch.Tensor, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """Where float32 may round or clip otherwise than float64."""
    codes = weight / alpha * (2 ** (bits - 1) - 1)
    ties = ((codes - codes.floor()) - 0.5).abs() < 1e-4
    return ties | ((weight.abs() / alpha - 1).abs() < 1e-5)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_value_at_the_end_of_the_range_is_outside() -> None:
    """Eq. 7 has ``w ≥ α`` there: the gradient is its sign, not 0."""
    weight = torch.tensor([[2.0, -2.0, 0.25, 0.5]])
    module = quantizer(weight, 2, PER_TENSOR, 1.0)
    own = weight.clone().requires_grad_()
    module(own).backward(torch.tensor([[1.0, 3.0, 0.0, 0.0]]))
    assert own.grad is not None
    assert own.grad.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert module.range.grad == pytest.approx((1.0 - 3.0) * 4.75 / 4)


def test_alpha_moves_with_gamma_and_with_the_weights() -> None:
    """``α = γ · mean|w|`` of the weights as they are now; the step in α is that in γ times the mean."""
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
    module = quantizer(weight, 4, PER_ROW, 0.8)
    before, _ = module.qparams(weight)
    torch.testing.assert_close(before, module.scale)
    with torch.no_grad():
        module.range += 0.25
    after, _ = module.qparams(weight)
    torch.testing.assert_close((after - before) * 7, 0.25 * weight.abs().mean(1, keepdim=True))
    larger, _ = module.qparams(3 * weight)
    torch.testing.assert_close(larger, 3 * after)


@pytest.mark.parametrize(("granularity", "shared"), [(PER_TENSOR, 60), (PER_ROW, 15)])
def test_the_lsq_factor_counts_what_shares_a_gamma(granularity: Granularity, shared: int) -> None:
    weight, gradient = torch.randn(2, 4, 15, generator=torch.Generator().manual_seed(5)).unbind()
    grads = []
    for gradient_scale in ("none", "lsq"):
        module = quantizer(weight, 3, granularity, 0.7, gradient_scale)
        module(weight.clone().requires_grad_()).backward(gradient)
        grads.append(module.range.grad)
    plain, scaled = grads
    assert plain is not None
    torch.testing.assert_close(scaled, plain / math.sqrt(shared * 3))


NORMAL, LAPLACE, UNIFORM = stats.norm, stats.laplace, stats.uniform(-1, 2)


@pytest.mark.parametrize(
    ("distribution", "bits", "gamma"),
    [
        (NORMAL, 2, 1.53), (NORMAL, 3, 2.45), (NORMAL, 4, 3.10), (NORMAL, 8, 5.0),
        (LAPLACE, 2, 2.00), (LAPLACE, 3, 3.50), (LAPLACE, 4, 4.86), (LAPLACE, 8, 9.7),
        (UNIFORM, 2, 1.33), (UNIFORM, 3, 1.72), (UNIFORM, 4, 1.87), (UNIFORM, 8, 2.00),
    ],
)  # fmt: skip
def test_gamma_starts_where_the_squared_error_is_least(
    distribution: stats.rv_continuous, bits: int, gamma: float
) -> None:
    """The optima of known distributions, of 2·10⁵ values that lie at their quantiles."""
    weight = torch.tensor(distribution.ppf((np.arange(200_000) + 0.5) / 200_000), dtype=torch.float32).reshape(1, -1)
    grid = Grid(bits, restricted=True)
    low, high = weight.aminmax(dim=1)
    scale, zero = grid.qparams(*search_golden(exact_loss(weight, grid), low, high, two_sided=False))
    module = LearnableQuantizer(
        QuantSpec(grid, PER_TENSOR), scale.reshape(()), zero.reshape(()), RangeSettings(parametrization="gamma"), weight
    )
    assert module.range.item() == pytest.approx(gamma, rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
def test_alternating_least_squares_ends_there_too(bits: int) -> None:
    """LAQ's solver in float64, ``b ← Q(clip(w/α))``, ``α ← ⟨b, w⟩/⟨b, b⟩``, on Gaussian weights."""
    levels, weight = 2 ** (bits - 1) - 1, NORMAL.ppf((np.arange(20_000) + 0.5) / 20_000)
    alpha = 2.0 * np.abs(weight).mean()
    for _ in range(200):
        codes = np.round(levels * np.clip(weight / alpha, -1, 1)) / levels
        alpha = codes @ weight / (codes @ codes)
    rows, grid = torch.tensor(weight, dtype=torch.float32).reshape(1, -1), Grid(bits, restricted=True)
    search: Callable[..., tuple[torch.Tensor, ...]] = search_golden
    _, high = search(exact_loss(rows, grid), *rows.aminmax(dim=1), two_sided=False)
    assert float(high) == pytest.approx(alpha, rel=0.01)


def test_a_grid_with_zero_points_is_refused() -> None:
    weight = torch.randn(2, 3)
    spec = QuantSpec(Grid(4, signed=False, symmetric=False), PER_TENSOR)
    scale, zero = spec.grid.qparams(weight.amin(), weight.amax())
    with pytest.raises(BitlowerError, match="module-wise scaling needs a symmetric grid"):
        LearnableQuantizer(spec, scale, zero, RangeSettings(parametrization="gamma"), weight)
