"""Kernel operators against numpy in float64: every kind of operand, rounding and output; and their shape functions."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import Granularity, Grid
from bitlower.ir.activations import IN_KERNELS
from bitlower.ir.kernels.references import fused_embedding, fused_linear, fused_norm, fused_pointwise
from bitlower.ir.quantization import numerics

_CASES = runpy.run_path(str(Path(__file__).parents[1] / "kernel_cases.py"))
GRIDS, activation, assert_codes, assert_values, codes, rounded = (
    _CASES[name] for name in ("GRIDS", "activation", "assert_codes", "assert_values", "codes", "rounded")
)
U8, S8, S4 = GRIDS["u8"], GRIDS["s8"], GRIDS["s4"]
TENSOR, TOKEN, CHANNEL = Granularity.per_tensor(), Granularity.per_token(), Granularity.per_channel(0)
PEG = Granularity.per_embedding_group(3)
WEIGHTS = {
    "tensor": (S8, TENSOR),
    "channel": (S8, CHANNEL),
    "asymmetric": (GRIDS["u4"], CHANNEL),
    "rows": (S8, Granularity.row_group(5)),
    "group": (S4, Granularity.per_group(8)),
    "uneven group": (S4, Granularity.per_group(16)),
    "two bits": (Grid(2, restricted=True), CHANNEL),
    "twelve bits": (Grid(12), CHANNEL),
}
K, N = 24, 10


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


def weight_of(kind: str = "channel"):
    return codes(normal(N, K, seed=1), *WEIGHTS[kind])


def weight_arguments(weight) -> dict[str, torch.Tensor]:
    return {"weight": weight.codes, "weight_scale": weight.scale, "weight_zero_point": weight.zero_point}


def operand(kind: str, name: str, *shape: int, seed: int = 0):
    """The arguments of an operand, and its real values."""
    x = normal(*shape, seed=seed)
    granularity = {"static": TENSOR, "token": TOKEN, "peg": PEG, "embedding": Granularity.per_embedding()}.get(kind)
    if granularity is None:
        return {name: x}, x.numpy().astype(np.float64)
    found = codes(x, U8, granularity)
    return found.named(name), found.values()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", ["float", "static", "token", "peg", "embedding"])
def test_linear_of_all_granularities(x: str, weight: str) -> None:
    arguments, values = operand(x, "x", 2, 3, K)
    matrix = weight_of(weight)
    [found] = fused_linear(**arguments, **weight_arguments(matrix))
    assert_values(found, values @ matrix.values().T)


@pytest.mark.parametrize("name", ["", *IN_KERNELS])
@pytest.mark.parametrize("residual", ["", "float", "static"])
def test_linear_epilogue(name: str, residual: str) -> None:
    arguments, values = operand("static", "x", 4, K)
    matrix, bias = weight_of(), normal(N, seed=2)
    expected = activation(name, values @ matrix.values().T + bias.numpy())
    if residual:
        more, added = operand(residual, "residual", 4, N, seed=3)
        arguments, expected = arguments | more, expected + added
    [found] = fused_linear(**arguments, **weight_arguments(matrix), bias=bias, activation=name)
    assert_values(found, expected)


@pytest.mark.parametrize("scale", [torch.tensor(0.05), torch.linspace(0.02, 0.1, N)[None], torch.tensor([[0.03, 0.2]])])
def test_linear_rounds_before_and_after_the_residual(scale: torch.Tensor) -> None:
    arguments, values = operand("static", "x", 4, K)
    more, added = operand("static", "residual", 4, N, seed=3)
    matrix, inner, zero = weight_of(), torch.tensor(0.25), torch.tensor(7.0)
    y = rounded(values @ matrix.values().T, inner.numpy(), zero.numpy(), S8) + added
    offset = torch.full_like(scale, 130.0)
    [taken, value, back] = _in_order(
        fused_linear(
            **arguments, **more, **weight_arguments(matrix), rounded_scale=inner, rounded_zero_point=zero,
            rounded_grid="s8", out_scale=scale, out_zero_point=offset, out_grid="u8 asymmetric",
            outputs="value codes rounded",
        ), (1, 0, 2)
    )  # fmt: skip
    assert_values(value, y)
    assert_codes(taken, y, scale, offset, U8)
    assert torch.equal(back, numerics.values(taken, scale, offset))


def _in_order(found, order):
    return [found[index] for index in order]


def test_merged_layers_are_the_layers_side_by_side() -> None:
    """Bit for bit, with a grid for each result."""
    arguments, _ = operand("token", "x", 2, 5, K)
    sizes, zero = [4, 1, 5], torch.tensor(3.0)
    matrix, bias = weight_of("group"), normal(N, seed=2)
    scales = [torch.tensor(0.1), torch.tensor(0.3), torch.tensor(0.7)]
    whole = {
        "out_scale": torch.cat([s.expand(n) for s, n in zip(scales, sizes, strict=True)]).reshape(1, 1, N),
        "out_zero_point": zero.expand(1, 1, N),
    }
    options = {"activation": "relu", "out_grid": "u8 asymmetric", "outputs": "value codes"}
    merged = fused_linear(**arguments, **weight_arguments(matrix), bias=bias, merged_n=sizes, **whole, **options)
    start, expected = 0, []
    for size, scale in zip(sizes, scales, strict=True):
        part = {name: tensor[start : start + size] for name, tensor in weight_arguments(matrix).items()}
        own = {"bias": bias[start : start + size], "out_scale": scale, "out_zero_point": zero}
        expected += fused_linear(**arguments, **part, **own, **options)
        start += size
    assert len(merged) == len(expected) == 6
    assert all(map(torch.equal, merged, expected))


def test_slices_of_columns_are_summed_in_turn() -> None:
    arguments, values = operand("peg", "x", 4, K)
    matrix, bias = weight_of(), normal(N, seed=2)
    [found] = fused_linear(**arguments, **weight_arguments(matrix), bias=bias, columns=[8, 12, 4])
    assert_values(found, values @ matrix.values().T + bias.numpy())
    x, w = (torch.from_numpy(part).float() for part in (values, matrix.values()))
    parts = [(x[:, a:b].contiguous(), w[:, a:b]) for a, b in itertools.pairwise((0, 8, 20, 24))]
    linear = torch.nn.functional.linear
    in_turn = (linear(*parts[0], bias) + linear(*parts[1])) + linear(*parts[2])
    assert torch.equal(found, in_turn)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("residual", ["", "float", "static"])
@pytest.mark.parametrize("gain", ["float", "codes", "none"])
def test_norm(norm: str, residual: str, gain: str) -> None:
    arguments, values = operand("static", "x", 2, 3, K)
    if residual:
        more, added = operand(residual, "residual", 2, 3, K, seed=3)
        arguments, values = arguments | more, values + added
    weight, bias = codes(normal(K, seed=4), S8, TENSOR), normal(K, seed=5) if norm == "layer" else None
    taken = {"float": normal(K, seed=4), "codes": weight.codes, "none": None}[gain]
    more = {"weight_scale": weight.scale, "weight_zero_point": weight.zero_point} if gain == "codes" else {}
    real = {"float": normal(K, seed=4).numpy(), "codes": weight.values(), "none": 1.0}[gain]
    centred = values - values.mean(-1, keepdims=True) if norm == "layer" else values
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * real
    expected = expected + (bias.numpy() if bias is not None else 0)
    outputs = "sum value codes" if residual else "value codes"
    scale, zero = torch.tensor(0.02), torch.tensor(120.0)
    found = fused_norm(
        **arguments, **more, weight=taken, bias=bias, norm=norm, eps=1e-6,
        out_scale=scale, out_zero_point=zero, out_grid="u8 asymmetric", outputs=outputs,
    )  # fmt: skip
    if residual:
        assert_values(found.pop(0), values)
    assert_values(found[0], expected)
    assert_codes(found[1], expected, scale, zero, U8)


@pytest.mark.parametrize("grid", ["u8 asymmetric", "s8", "u4 asymmetric", "s8 half-range"])
def test_scales_are_chosen_for_each_token(grid: str) -> None:
    """By the definition of the range: zero is in it, both ends are representable."""
    x = normal(2, 3, K)
    value, taken, scale, zero, back = fused_pointwise(
        x, activation="silu", out_grid=grid, outputs="value codes scale zero_point rounded"
    )
    y = activation("silu", x.numpy().astype(np.float64))
    low, high = np.minimum(y.min(-1, keepdims=True), 0), np.maximum(y.max(-1, keepdims=True), 0)
    bits, half = int(grid[1]), 2 ** (int(grid[1]) - 1)
    absolute = np.maximum(-low, high)
    step = {"s8": absolute / (half - 1), "s8 half-range": absolute / half}.get(grid, (high - low) / (2**bits - 1))
    assert_values(value, y)
    assert scale.shape == zero.shape == (2, 3, 1)
    assert np.allclose(scale, step, rtol=1e-5)
    assert np.array_equal(zero, np.zeros_like(step) if grid[0] == "s" else np.rint(-low / step))
    assert_codes(taken, y, scale, zero, Grid.parse(grid))
    assert torch.equal(back, numerics.values(taken, scale, zero))


@pytest.mark.parametrize("x", ["float", "static", "token"])
@pytest.mark.parametrize("factor", ["", "float", "static"])
@pytest.mark.parametrize("residual", ["", "static"])
def test_pointwise(x: str, factor: str, residual: str) -> None:
    arguments, expected = operand(x, "x", 4, K)
    expected = activation("gelu-tanh", expected)
    if factor:
        more, values = operand(factor, "factor", 4, K, seed=3)
        arguments, expected = arguments | more, expected * values
    if residual:
        more, values = operand(residual, "residual", 4, K, seed=4)
        arguments, expected = arguments | more, expected + values
    scale, zero = torch.tensor([[0.01, 0.02, 0.05]]), torch.tensor([[100.0, 90.0, 3.0]])
    value, taken = fused_pointwise(
        **arguments, activation="gelu-tanh", out_scale=scale, out_zero_point=zero, out_grid="u8 asymmetric",
        outputs="value codes",
    )  # fmt: skip
    assert_values(value, expected)
    assert_codes(taken, expected, scale, zero, U8)


def test_heads_are_joined_and_quantized_per_token() -> None:
    x = normal(2, 4, 3, 5)
    value, taken, scale, zero = fused_pointwise(
        x, heads=True, out_grid="u8 asymmetric", outputs="value codes scale zero_point"
    )
    y = np.moveaxis(x.numpy().astype(np.float64), 1, 2).reshape(2, 3, 20)
    assert_values(value, y)
    assert_codes(taken, y, scale, zero, U8)


@pytest.mark.parametrize("table", ["tensor", "channel", "group", "rows"])
def test_a_sum_of_rows_of_tables(table: str) -> None:
    tables = [codes(normal(N, K, seed=seed), *WEIGHTS[table]) for seed in (1, 2, 3)]
    ids = [torch.randint(N, (2, 4)), torch.randint(N, (2, 4)), torch.tensor([[0, 9, 1, 1]])]
    inner, middle, scale, zero = (torch.tensor(v) for v in (0.05, 128.0, 0.06, 120.0))
    arguments = [[getattr(t, name) for t in tables] for name in ("codes", "scale", "zero_point")]
    value, taken = fused_embedding(
        ids, *arguments, [inner], [middle], rounded_grid="u8 asymmetric",
        out_scale=scale, out_zero_point=zero, out_grid="u8 asymmetric", outputs="value codes",
    )  # fmt: skip
    rows = [t.values()[i.numpy()] for t, i in zip(tables, ids, strict=True)]
    expected = rounded(rows[0] + rows[1], inner.numpy(), middle.numpy(), U8) + rows[2]
    assert_values(value, expected)
    assert_codes(taken, expected, scale, zero, U8)
    [plain] = fused_embedding(ids[:2], *(part[:2] for part in arguments), [], [])
    assert_values(plain, rows[0] + rows[1])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["float", "static", "token", "peg"]), st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from([*IN_KERNELS, ""]), st.booleans(), st.sampled_from(["", "float", "static"]),
    st.integers(1, 5), st.integers(0, 9),
)  # fmt: skip
def test_any_linear(x, weight, name, bias, residual, rows, seed) -> None:
    arguments, values = operand(x, "x", rows, K, seed=seed)
    matrix = weight_of(weight)
    expected = values @ matrix.values().T
    if bias:
        arguments["bias"] = normal(N, seed=seed + 1)
        expected = expected + arguments["bias"].numpy()
    expected = activation(name, expected)
    if residual:
        more, added = operand(residual, "residual", rows, N, seed=seed + 2)
        arguments, expected = arguments | more, expected + added
    [found] = fused_linear(**arguments, **weight_arguments(matrix), activation=name)
    assert_values(found, expected)


def test_shape_functions_and_schemas() -> None:
    """``opcheck`` runs each operator on fake tensors too, and sees that nothing is written to or given back."""
    scale, zero = torch.tensor(0.1), torch.tensor(128.0)
    out = {"out_scale": scale, "out_zero_point": zero, "out_grid": "u8 asymmetric", "outputs": "value codes rounded"}
    token = {"out_grid": "s8", "outputs": "codes scale zero_point"}
    x, matrix = codes(normal(2, 3, K), U8, TENSOR).named("x"), weight_arguments(weight_of())
    positional = (x["x"], *matrix.values())
    table = (weight_of().codes, weight_of().scale, weight_of().zero_point)
    tables = ([torch.zeros(2, 3, dtype=torch.int64)], *([part] for part in table), [], [])
    heads = {"heads": True}
    cases = [
        (fused_linear, positional, {"x_scale": scale, "x_zero_point": zero, "merged_n": [4, 6], **out}),
        (fused_norm, (normal(2, 3, K), None, None), {"norm": "rms", "eps": 1e-6, **token}),
        (
            fused_norm,
            (normal(2, K), None, None),
            {"norm": "layer", "eps": 1e-6, "residual": normal(2, K), "outputs": "sum"},
        ),
        (fused_pointwise, (normal(2, 4, 3, 5),), {**heads, **token}),
        (fused_pointwise, (normal(2, 4, 3, 5),), {**heads, "outputs": "value"}),
        (fused_pointwise, (x["x"],), {"x_scale": scale, "x_zero_point": zero, **out}),
        (fused_embedding, tables, out),
    ]
    for op, args, kwargs in cases:
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
