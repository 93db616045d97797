"""Learned rounding against its formulas in numpy, and against every rounding there is on a small layer."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitlower.ir import Granularity, Grid
from bitlower.ir.quantization import numerics
from bitlower.passes.rounding import _adaround_solver as module
from bitlower.passes.rounding._adaround_solver import AdaroundLayer, AdaroundOptions, SoftWeight, exponent, solve

OPTIONS = AdaroundOptions(iterations=400, learning_rate=0.02, batch=64, regularization=3.0, warmup=0.2)
GRANULARITIES = (Granularity.per_tensor(), Granularity.per_channel(0), Granularity.per_group(4))


def layer(
    grid: Grid, granularity: Granularity, rows: int = 6, columns: int = 12, tokens: int = 200, activation=lambda y: y
) -> AdaroundLayer:
    """Correlated inputs; targets are those of inputs that differ a little, as behind float predecessors."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    floats = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs = floats + 0.1 * torch.randn(tokens, columns, generator=generator)
    scale, zero = grid.qparams(*granularity.range_of(weight))
    targets = activation(torch.nn.functional.linear(floats, weight, bias))
    weights = 2 * torch.rand(tokens, generator=generator)
    return AdaroundLayer(
        weight, bias, activation, scale, zero, (grid.quant_min, grid.quant_max), inputs, targets, weights
    )


def float64(layer: AdaroundLayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = (layer.weight, layer.spread(layer.scale), layer.spread(layer.zero))
    return tuple(part.numpy().astype(np.float64) for part in parts)


def losses(layer: AdaroundLayer, weight: np.ndarray) -> np.ndarray:
    """Of each output, float64."""
    output = layer.inputs.double().numpy() @ weight.T + layer.bias.double().numpy()
    return (layer.weights.double().numpy()[:, None] * (output - layer.targets.double().numpy()) ** 2).mean(0)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("grid", [Grid(2), Grid(4), Grid(3, signed=False, symmetric=False)], ids=str)
def test_at_first_soft_weights_are_the_clipped_ones_and_hard_ones_the_nearest(grid, granularity) -> None:
    problem = layer(grid, granularity)
    weight, scale, zero = float64(problem)
    soft = SoftWeight(problem)
    low, high = ((limit - zero) * scale for limit in problem.limits)
    np.testing.assert_allclose(soft.soft(soft.share()).detach(), weight.clip(low, high), rtol=1e-4, atol=1e-5)
    nearest = np.clip(np.floor(weight / scale + 0.5) + zero, *problem.limits)
    np.testing.assert_array_equal(soft.codes(), nearest)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_no_output_is_worse_than_with_the_nearest_codes(granularity) -> None:
    problem = layer(Grid(3), granularity)
    found = solve(problem, OPTIONS, torch.Generator().manual_seed(0))
    _, scale, zero = float64(problem)
    nearest = numerics.codes(problem.weight, problem.scale, problem.zero, *problem.limits).numpy()
    np.testing.assert_allclose(found.loss, losses(problem, (found.codes.numpy() - zero) * scale), rtol=1e-4)
    np.testing.assert_allclose(found.nearest_loss, losses(problem, (nearest - zero) * scale), rtol=1e-4)
    assert bool((found.loss <= found.nearest_loss).all())
    assert float(found.loss.sum()) < 0.8 * float(found.nearest_loss.sum())
    assert found.flipped == int((found.codes.numpy() != nearest).sum())
    neighbours = np.abs(found.codes.numpy() - zero - problem.weight.numpy() / scale)
    inside = (found.codes.numpy() > problem.limits[0]) & (found.codes.numpy() < problem.limits[1])
    assert float(neighbours[inside].max()) < 1  # up or down, nothing else


def test_it_comes_near_the_best_of_all_roundings() -> None:
    problem = layer(Grid(3), Granularity.per_channel(0), rows=5, columns=8)
    found = solve(problem, OPTIONS, torch.Generator().manual_seed(0))
    weight, scale, zero = float64(problem)
    choices = np.array(list(itertools.product((0, 1), repeat=8)))
    best = []
    for row in range(5):
        codes = np.clip(np.floor(weight[row] / scale[row]) + choices + zero[row], *problem.limits)
        output = problem.inputs.double().numpy() @ ((codes - zero[row]) * scale[row]).T + problem.bias[row].item()
        error = (output - problem.targets[:, row, None].double().numpy()) ** 2
        best.append((problem.weights.double().numpy()[:, None] * error).mean(0).min())
    assert float(found.loss.sum()) < 1.5 * sum(best)
    assert bool((found.loss.numpy() >= np.array(best) * (1 - 1e-4)).all())


def test_the_activation_function_counts() -> None:
    """A token whose output is cut off by ReLU asks nothing of the weights."""
    problem = layer(Grid(2), Granularity.per_channel(0), activation=torch.relu)
    through = solve(problem, OPTIONS, torch.Generator().manual_seed(0))
    before = torch.nn.functional.linear(problem.inputs, problem.weight, problem.bias)
    without = solve(
        replace(problem, activation=lambda y: y, targets=before), OPTIONS, torch.Generator().manual_seed(0)
    )  # fmt: skip
    _, scale, zero = float64(problem)
    values = torch.from_numpy((without.codes.numpy() - zero) * scale).float()
    assert float(through.loss.sum()) < float(problem.row_losses(values).sum())


def test_the_exponent_falls_from_20_to_2_as_a_cosine() -> None:
    options = replace(OPTIONS, iterations=100, warmup=0.2)
    assert exponent(19, options) is None
    assert exponent(20, options) == 20
    assert exponent(60, options) == pytest.approx(11)
    assert exponent(99, options) == pytest.approx(2, abs=0.01)
    assert exponent(0, replace(options, warmup=0.0)) == 20


def test_the_objective_is_the_paper_s() -> None:
    """Equation 25 in float64: squared error summed over outputs, and λ Σ (1 − |2h − 1|^β)."""
    problem = layer(Grid(4), Granularity.per_channel(0))
    soft = SoftWeight(problem)
    index = torch.arange(50)
    found = float(module._objective(problem, soft, index, 2.0, 7.0, 0.01).detach())
    _, scale, zero = float64(problem)
    alpha = soft.alpha.detach().double().numpy()
    share = np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)
    floor = np.floor(
        (problem.weight / problem.spread(problem.scale)).numpy()
    )  # in float32, as the ends are whole there
    values = (np.clip(floor + share + zero, *problem.limits) - zero) * scale
    output = problem.inputs[:50].double().numpy() @ values.T + problem.bias.double().numpy()
    error = ((output - problem.targets[:50].double().numpy()) ** 2).sum(1) @ problem.weights[:50].double().numpy() / 50
    assert found == pytest.approx(error / 2 + 0.01 * (1 - np.abs(2 * share - 1) ** 7).sum(), rel=1e-4)


def test_the_regularizer_decides_every_rounding() -> None:
    problem = layer(Grid(4), Granularity.per_channel(0))
    soft = SoftWeight(problem)
    optimizer = torch.optim.Adam([soft.alpha], lr=0.02)
    for step in range(600):
        optimizer.zero_grad()
        beta = exponent(step, replace(OPTIONS, iterations=600))
        module._objective(problem, soft, torch.arange(200), 1.0, beta, 3.0).backward()
        optimizer.step()
    share = soft.share().detach()
    assert float(torch.minimum(share, 1 - share).max()) < 0.05


def test_the_scale_of_inputs_and_outputs_does_not_matter() -> None:
    problem = layer(Grid(3), Granularity.per_channel(0))
    larger = replace(problem, inputs=problem.inputs * 64, bias=problem.bias * 64, targets=problem.targets * 64)
    first, second = (solve(each, OPTIONS, torch.Generator().manual_seed(0)) for each in (problem, larger))
    assert float((first.codes == second.codes).float().mean()) > 0.9


def test_a_weight_on_its_grid_stays() -> None:
    problem = layer(Grid(4), Granularity.per_channel(0))
    codes = numerics.codes(problem.weight, problem.scale, problem.zero, *problem.limits)
    weight = numerics.values(codes, problem.scale, problem.zero)
    targets = torch.nn.functional.linear(problem.inputs, weight, problem.bias)
    found = solve(replace(problem, weight=weight, targets=targets), OPTIONS, torch.Generator().manual_seed(0))
    assert torch.equal(found.codes, codes)
    assert float(found.loss.sum()) == 0


def test_the_same_seed_gives_the_same_codes() -> None:
    problem = layer(Grid(3), Granularity.per_channel(0))
    first, again = (solve(problem, OPTIONS, torch.Generator().manual_seed(3)).codes for _ in range(2))
    assert torch.equal(first, again)
