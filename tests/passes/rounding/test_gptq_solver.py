"""The solver against the published algorithm in float64 numpy, and against what must hold whatever the layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitlower.ir import BitlowerError, Granularity, Grid, ScaleConvention
from bitlower.ir.quantization import numerics
from bitlower.passes.rounding._gptq_factor import factorize
from bitlower.passes.rounding._gptq_grids import Grids
from bitlower.passes.rounding._gptq_solver import GptqOptions, GptqSolution, solve

CHANNEL = Granularity.per_channel()
U4 = Grid(4, signed=False, symmetric=False)
GRIDS = [
    U4,
    Grid(3),
    Grid(8),
    Grid(2, signed=False, symmetric=False),
    Grid(2, restricted=True),
    Grid(4, convention=ScaleConvention.HALF_RANGE),
    Grid(4, signed=False, convention=ScaleConvention.OFFSET),
]
PLAIN = GptqOptions(guard=False)


def layer(rows: int = 12, columns: int = 96, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs ``[tokens, columns]`` whose columns differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=g) @ mix * torch.rand(columns, generator=g).add(0.1)
    return torch.randn(rows, columns, generator=g), inputs


def moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def published(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int, damping: float, order: list[int], static: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Frantar et al. 2022, algorithm 1, one column at a time, in float64: the weights, and the errors by U_jj."""
    w = weight.numpy().astype(np.float64)[:, order]
    h = hessian.numpy().astype(np.float64)[np.ix_(order, order)]
    h += damping * h.diagonal().mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    parts = [weight[:, i : i + group] for i in range(0, len(h), group)]
    fixed = [grid.qparams(part.amin(1), part.amax(1)) for part in parts]
    rounded, errors = np.zeros_like(w), np.zeros_like(w)
    for j in range(len(h)):
        if static:
            scale, zero = fixed[order[j] // group]
        elif j % group == 0:
            part = torch.tensor(w[:, j : j + group])
            scale, zero = grid.qparams(part.amin(1), part.amax(1))
        s, z = scale.numpy().astype(np.float64), zero.numpy()
        rounded[:, j] = s * (np.clip(np.rint(w[:, j] / s) + z, grid.quant_min, grid.quant_max) - z)
        errors[:, j] = (w[:, j] - rounded[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(errors[:, j], upper[j, j:])
    return rounded[:, np.argsort(order)], errors


def sequence(hessian: torch.Tensor, kind: str, group: int) -> list[int]:
    """The columns in the order in which they are solved, by plain sorting."""
    diagonal = hessian.diagonal().tolist()
    by_size = sorted(range(len(diagonal)), key=lambda j: -diagonal[j])
    if kind != "grouped":
        return by_size if kind == "full" else list(range(len(diagonal)))
    groups = sorted(range(len(diagonal) // group), key=lambda g: -max(diagonal[g * group : (g + 1) * group]))
    return [j for g in groups for j in by_size if j // group == g]


def exact_loss(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> np.ndarray:
    """``‖(w − q) X‖² / tokens`` of each row, in float64."""
    outputs = (weight.double() - rounded.double()) @ inputs.double().T
    return (outputs.square().sum(1) / len(inputs)).numpy()


def rtn(weight: torch.Tensor, grid: Grid, granularity: Granularity) -> torch.Tensor:
    scale, zero = grid.qparams(*granularity.range_of(weight))
    return numerics.fake(weight, scale, zero, grid.quant_min, grid.quant_max)


def check_layout(solution: GptqSolution, weight: torch.Tensor, grid: Grid, granularity: Granularity) -> None:
    """Shapes, dtypes, and the weight as exactly what the codes say; the same fake quantizer gives it back."""
    assert solution.scale.shape == solution.zero_point.shape == granularity.scale_shape(tuple(weight.shape))
    assert solution.codes.dtype == grid.dtype
    codes = solution.codes.float()
    assert codes.min() >= grid.quant_min
    assert codes.max() <= grid.quant_max
    assert torch.equal(solution.weight, numerics.values(solution.codes, solution.scale, solution.zero_point))
    again = numerics.fake(solution.weight, solution.scale, solution.zero_point, grid.quant_min, grid.quant_max)
    assert torch.equal(again, solution.weight)


@pytest.mark.parametrize("kind", ["none", "full", "grouped"])
@pytest.mark.parametrize("group", [96, 8, 32, 48])
@pytest.mark.parametrize("grid", [U4, Grid(3), Grid(8)], ids=str)
def test_it_is_the_published_algorithm(grid: Grid, group: int, kind: str) -> None:
    weight, inputs = layer()
    hessian = moment(inputs)
    static = kind == "full"
    expected, _ = published(weight, hessian, grid, group, 0.01, sequence(hessian, kind, group), static)
    options = replace(PLAIN, order=kind, static_groups=static)
    granularity = CHANNEL if group == 96 else Granularity.per_group(group)
    solution = solve(weight, hessian, grid, granularity, options)
    check_layout(solution, weight, grid, granularity)
    # A weight half way between two codes may round the other way in float32, and change what follows in its row.
    same = np.isclose(solution.weight.numpy(), expected, rtol=1e-4, atol=1e-6).all(1)
    assert same.mean() >= 0.9
    other = exact_loss(weight, torch.tensor(expected), inputs)
    np.testing.assert_allclose(solution.loss[same], other[same], rtol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group", [96, 16])
def test_a_diagonal_hessian_gives_round_to_nearest_bit_for_bit(grid: Grid, group: int) -> None:
    weight = layer(40)[0]
    weight[0] = torch.arange(96) / 4  # ties
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    granularity = Granularity.per_group(group)
    solution = solve(weight, diagonal.diag(), grid, granularity, PLAIN)
    check_layout(solution, weight, grid, granularity)
    assert torch.equal(solution.weight, rtn(weight, grid, granularity))


@pytest.mark.parametrize("order", ["none", "full", "grouped"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_loss_is_that_of_the_outputs(damping: float, order: str) -> None:
    """½ Σ e² of the paper, that of the loop here and ‖(W − Q)X‖² are one number, each computed its own way."""
    weight, inputs = layer()
    hessian = moment(inputs)
    solution = solve(weight, hessian, U4, CHANNEL, GptqOptions(damping=damping, order=order))
    np.testing.assert_allclose(solution.loss, exact_loss(weight, solution.weight, inputs), rtol=1e-3)
    assert solution.rtn_loss is not None
    np.testing.assert_allclose(solution.rtn_loss, exact_loss(weight, rtn(weight, U4, CHANNEL), inputs), rtol=1e-3)
    rounded, errors = published(weight, hessian, U4, 96, damping, sequence(hessian, order, 96), False)
    error = weight.numpy() - rounded
    damped = hessian.numpy() + damping * hessian.diagonal().mean().item() * np.eye(96)
    np.testing.assert_allclose((errors**2).sum(1), np.einsum("ri,ij,rj->r", error, damped, error), rtol=1e-4)


@pytest.mark.parametrize("group", [96, 8, 48])
@pytest.mark.parametrize("order", ["none", "full", "grouped"])
def test_the_block_size_does_not_matter(order: str, group: int) -> None:
    weight, inputs = layer()
    granularity = Granularity.per_group(group)
    results = [
        solve(weight, moment(inputs), U4, granularity, GptqOptions(order=order, block=block)).codes.float()
        for block in (32, 1, 7, 128)
    ]
    for other in results[1:]:
        assert (results[0] != other).any(1).float().mean() <= 0.1  # ties, as above


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**30])
def test_the_scale_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, inputs = layer()
    one, other = (solve(weight, moment(inputs) * f, U4, Granularity.per_group(32)) for f in (1.0, factor))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def test_act_order_is_a_permutation_by_hand() -> None:
    weight, inputs = layer()
    hessian = moment(inputs)
    order = torch.tensor(sequence(hessian, "full", 96))
    ordered = solve(weight, hessian, U4, CHANNEL, replace(PLAIN, order="full"))
    by_hand = solve(weight[:, order], hessian[order][:, order], U4, CHANNEL, PLAIN)
    assert torch.equal(ordered.codes[:, order], by_hand.codes)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    shuffled = solve(weight[:, shuffle], hessian[shuffle][:, shuffle], U4, CHANNEL, replace(PLAIN, order="full"))
    assert torch.equal(ordered.codes[:, shuffle], shuffled.codes)


@pytest.mark.parametrize("options", [GptqOptions(order="full"), GptqOptions(order="grouped", static_groups=True)])
def test_static_groups_keep_every_column_on_the_grid_of_its_group(options: GptqOptions) -> None:
    weight, inputs = layer()
    granularity = Granularity.per_group(16)
    solution = solve(weight, moment(inputs), U4, granularity, options)
    scale, zero = U4.qparams(*granularity.range_of(weight))
    assert torch.equal(solution.scale, scale)
    assert torch.equal(solution.zero_point, zero)
    check_layout(solution, weight, U4, granularity)


def test_most_layers_get_better_and_the_more_the_more_inputs_correlate() -> None:
    """Not a theorem; a statistic over seeded layers."""
    ratios = []
    for seed in range(20):
        weight, inputs = layer(8, 48, seed=seed)
        solution = solve(weight, moment(inputs), Grid(3), CHANNEL, PLAIN)
        ratios.append(solution.loss.sum().item() / exact_loss(weight, rtn(weight, Grid(3), CHANNEL), inputs).sum())
    assert np.median(ratios) < 0.7
    assert max(ratios) < 1


@given(st.integers(0, 10**6), st.sampled_from([4, 12]), st.sampled_from([4, 2, 12]), st.sampled_from(GRIDS))
def test_no_row_is_worse_than_rounding_it_to_nearest(seed: int, columns: int, group: int, grid: Grid) -> None:
    """Near-singular Hessians, where unguarded error feedback runs into the ends of the grid."""
    assume(columns % group == 0)
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(1, columns // 4), columns, generator=g)
    inputs = torch.randn(50, len(directions), generator=g) @ directions + 1e-3 * torch.randn(50, columns, generator=g)
    weight = torch.randn(30, columns, generator=g)
    granularity = Granularity.per_group(group)
    guarded = solve(weight, moment(inputs), grid, granularity, GptqOptions(damping=1e-4))
    nearest = exact_loss(weight, rtn(weight, grid, granularity), inputs)
    ours = exact_loss(weight, guarded.weight, inputs)
    assert (ours <= nearest * 1.01 + 1e-6 * nearest.max()).all()
    assert torch.equal(guarded.weight[guarded.rtn_mask], rtn(weight, grid, granularity)[guarded.rtn_mask])
    check_layout(guarded, weight, grid, granularity)


def test_the_guard_is_needed() -> None:
    worse = kept = 0
    for seed in range(10):
        weight, inputs = layer(64, 8, seed=seed)
        loose = solve(weight, moment(inputs), Grid(2), CHANNEL, PLAIN)
        guarded = solve(weight, moment(inputs), Grid(2), CHANNEL)
        assert guarded.rtn_loss is not None
        worse += int((loose.loss > guarded.rtn_loss).sum())
        kept += int(guarded.rtn_mask.sum())
        assert torch.equal(guarded.loss, torch.minimum(loose.loss, guarded.rtn_loss))
    assert worse == kept > 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_on_its_grid_stays_as_it_is(grid: Grid) -> None:
    inputs = layer()[1]
    codes = torch.randint(grid.quant_min, grid.quant_max + 1, (12, 96), generator=torch.Generator().manual_seed(5))
    codes[:, 0], codes[:, 1] = grid.quant_min, grid.quant_max
    weight = codes * 0.25
    if not grid.symmetric:
        weight -= 0.25 * (grid.quant_max // 2)
    fitting = solve(weight, moment(inputs), grid, CHANNEL, PLAIN)
    if torch.equal(rtn(weight, grid, CHANNEL), weight):  # not all conventions can hold both ends
        assert torch.equal(fitting.weight, weight)
        assert fitting.loss.max() == 0
    twice = solve(fitting.weight, moment(inputs), Grid(8), CHANNEL)
    assert twice.loss.max() <= fitting.loss.max() + 1


def test_dead_columns_become_zero_and_the_outputs_stay() -> None:
    weight, inputs = layer()
    alive = torch.ones(96)
    alive[[0, 17, 95]] = 0
    inputs = inputs * alive
    for order in ("none", "full", "grouped"):
        solution = solve(weight, moment(inputs), U4, Granularity.per_group(16), GptqOptions(order=order, refine=1))
        assert not solution.weight[:, alive == 0].any()
        assert solution.weight[:, 1].any()
        without = solve(
            weight * alive, moment(inputs), U4, Granularity.per_group(16), GptqOptions(order=order, refine=1)
        )
        assert torch.equal(solution.codes, without.codes)
        np.testing.assert_allclose(solution.loss, exact_loss(weight, solution.weight, inputs), rtol=1e-3)


def test_many_bits_lose_next_to_nothing_and_more_bits_lose_less() -> None:
    weight, inputs = layer()
    losses = [solve(weight, moment(inputs), Grid(bits), CHANNEL, PLAIN).loss.sum().item() for bits in (2, 3, 4, 8, 12)]
    assert losses == sorted(losses, reverse=True)
    energy = exact_loss(weight, torch.zeros_like(weight), inputs).sum()
    assert losses[-1] < 1e-6 * energy


def test_layers_may_be_stacked_and_share_a_factor() -> None:
    first, inputs = layer()
    second = layer(20, seed=1)[0]
    factor = factorize(moment(inputs), damping=0.01, group=32)
    granularity = Granularity.per_group(32)
    stacked = solve(torch.cat([first, second]), factor, U4, granularity)
    apart = [solve(w, moment(inputs), U4, granularity) for w in (first, second)]
    differ = stacked.codes != torch.cat([part.codes for part in apart])
    assert differ.any(1).float().mean() <= 0.1  # ties, as above


def test_axes_count_from_either_end_and_groups_bind_their_own_order_alone() -> None:
    weight, inputs = layer()
    hessian = moment(inputs)
    for first, second in (
        (CHANNEL, Granularity.per_channel(-2)),
        (Granularity.per_group(16), Granularity.per_group(16, -1)),
    ):
        assert torch.equal(*(solve(weight, hessian, U4, granularity).codes for granularity in (first, second)))
    for order, fits in (("none", True), ("full", True), ("grouped", False)):
        factor = factorize(hessian, order=order, group=32)
        if fits:
            solve(weight, factor, U4, CHANNEL, GptqOptions(order=order))
        else:
            with pytest.raises(BitlowerError, match=r"factored for order grouped and groups of 32, not for .* of 96"):
                solve(weight, factor, U4, CHANNEL, GptqOptions(order=order))


def test_a_short_calibration_gives_a_result() -> None:
    weight, inputs = layer(tokens=10)
    solution = solve(weight, moment(inputs), U4, Granularity.per_group(32))
    assert solution.rtn_loss is not None
    assert torch.isfinite(solution.weight).all()
    assert solution.loss.sum() < 0.5 * solution.rtn_loss.sum()


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([96, 16]), st.sampled_from([Grid(2), U4]))
def test_best_ranges_are_the_best_of_each_row(seed: int, group: int, grid: Grid) -> None:
    weight, inputs = layer(seed=seed)
    granularity = Granularity.per_group(group)
    best, plain, searched = (
        solve(weight, moment(inputs), grid, granularity, replace(PLAIN, ranges=r))
        for r in ("best", "minmax", "weighted-mse")
    )
    assert torch.equal(best.loss, torch.minimum(plain.loss, searched.loss))
    np.testing.assert_allclose(best.loss, exact_loss(weight, best.weight, inputs), rtol=1e-3)
    check_layout(best, weight, grid, granularity)


@pytest.mark.parametrize("grid", [Grid(2), Grid(2, signed=False, symmetric=False)], ids=str)
def test_searched_ranges_pay_at_two_bits(grid: Grid) -> None:
    weight, inputs = layer(64, 128)
    plain, searched, weighted = (
        solve(weight, moment(inputs), grid, CHANNEL, replace(PLAIN, ranges=ranges)).loss.sum()
        for ranges in ("minmax", "mse", "weighted-mse")
    )
    assert searched < 0.8 * plain
    assert weighted < 0.8 * plain


@pytest.mark.parametrize("order", ["none", "full", "grouped"])
@pytest.mark.parametrize("group", [96, 16])
def test_weighted_ranges_weigh_each_column_by_its_own_entry(order: str, group: int) -> None:
    """With a diagonal Hessian its pivots are its entries, whatever the order."""
    weight = layer()[0]
    diagonal = torch.logspace(-2, 2, 96)[torch.randperm(96, generator=torch.Generator().manual_seed(4))]
    options = replace(PLAIN, order=order, ranges="weighted-mse", damping=0.0)
    solution = solve(weight, diagonal.diag(), U4, Granularity.per_group(group), options)
    expected = Grids.over(weight.T.contiguous(), diagonal, U4, group, "weighted-mse")
    np.testing.assert_allclose(solution.scale.T, expected.scale, rtol=1e-6)


def broken(value: float) -> torch.Tensor:
    weight = layer()[0].clone()
    weight[3, 5] = value
    return weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((broken(float("nan")), torch.eye(96), U4, CHANNEL), "dense: its weight holds NaN or Inf"),
        ((broken(float("-inf")), torch.eye(96), U4, CHANNEL), "dense: its weight holds NaN or Inf"),
        ((layer()[0], torch.eye(95), U4, CHANNEL), "dense: 96 columns do not fit a Hessian of 95"),
        ((layer()[0], torch.eye(96), U4, Granularity.per_tensor()), "dense: error feedback needs a scale of its own"),
        ((layer()[0], torch.eye(96), U4, Granularity.per_channel(1)), "dense: error feedback needs a scale of its own"),
        ((layer()[0], torch.eye(96), U4, Granularity.per_group(16, 0)), "dense: error feedback needs"),
        (
            (layer()[0], torch.eye(96), U4, Granularity.per_group(36)),
            "dense: groups of 36 do not divide its 96",
        ),
        ((layer()[0][0], torch.eye(96), U4, CHANNEL), "dense: a weight has rows and columns"),
        ((layer()[0], torch.eye(96), U4, CHANNEL, GptqOptions(block=0)), "dense: a block has at least one column"),
        ((layer()[0], torch.zeros(96, 96), U4, CHANNEL), "dense was never reached by calibration data"),
        (
            (layer()[0], factorize(torch.eye(96)), U4, CHANNEL, GptqOptions(order="full")),
            "dense: its Hessian was factored",
        ),
    ],
)
def test_what_cannot_be_solved_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        solve(*arguments, name="dense")
