"""Kernels that PoCL cannot run, float16 and matrix instructions, from their CUDA source, against float64."""

from dataclasses import replace

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import ActivationSpec, GemmConfig, LinearSpec, NormSpec, Target, device_source
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec

UINT8, INT8 = Grid(8, signed=False, symmetric=False), Grid(8)
STATIC, TOKEN = (QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
BYTES = QuantSpec(INT8, Granularity.per_channel(0))
SPEC = LinearSpec(k=128, n=75, weight=BYTES, bias=True, target=Target.CUDA)
HALF = 4e-3
"""Products of float16 weights and sums in float32: an error of two roundings to 11 bits."""


def low_bit(bits):
    return QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_group(64))


@pytest.mark.parametrize(
    "changes",
    [
        {"x_quant": STATIC, "output": STATIC, "activation": "gelu"},
        {"x_quant": QuantSpec(INT8, Granularity.per_token()), "residual": True},
        {"x_quant": TOKEN, "weight": QuantSpec(Grid(4), Granularity.per_channel(0))},
    ],
    ids=["static", "token", "w4"],
)
def test_int8_matrices(make_linear, on_fibers, changes):
    spec = replace(SPEC, **changes)
    assert "matrix_a, 16, 16, 16, signed char" in device_source(spec)
    for rows in (3, 70):
        case = make_linear(spec, rows)
        results, launched = on_fibers(spec, case.given)
        case.check(results)
        assert launched == [f"{spec.name}_kernel" + ("_1" if rows >= 16 else "")]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float16_matrices_with_weights_unfolded_in_shared_memory(make_linear, on_fibers, bits):
    spec = replace(SPEC, weight=low_bit(bits), dtype="float16")
    assert "matrix_a, 16, 16, 16, half" in device_source(spec)
    for rows in (3, 70):
        case = make_linear(spec, rows)
        case.check(on_fibers(spec, case.given)[0], limit=HALF)


@pytest.mark.parametrize("dtypes", [{}, {"x": "float32", "residual": "float32", "values": "float32"}])
def test_float16_products_of_small_groups(make_linear, on_fibers, dtypes):
    """Groups within what is staged at a time; operands and results in either dtype."""
    weight = QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_group(16))
    spec = replace(SPEC, weight=weight, dtype="float16", residual=True).holding({"bias": "float32"} | dtypes)
    assert "matrix_a, 16, 16, 16, half" in device_source(spec)
    for rows in (3, 70):
        case = make_linear(spec, rows)
        results, _ = on_fibers(spec, case.given)
        assert results["values"].dtype == dtypes.get("values", "float16")
        case.check(results, limit=HALF)


def test_float16_products_without_matrices(make_linear, on_fibers):
    """Inputs that are no multiple of what matrix instructions take at a time."""
    spec = replace(SPEC, k=36, weight=QuantSpec(INT8, Granularity.per_channel(0)), dtype="float16")
    assert "matrix_a" not in device_source(spec)
    for rows in (3, 70):
        case = make_linear(spec, rows)
        case.check(on_fibers(spec, case.given)[0], limit=HALF)


def test_float16_weights(make_linear, on_fibers):
    spec = replace(SPEC, weight=None, dtype="float16")
    for rows in (3, 70):
        case = make_linear(spec, rows)
        case.check(on_fibers(spec, case.given)[0], limit=HALF)


def test_products_of_bytes(make_linear, on_fibers):
    spec = replace(SPEC, weight=low_bit(4), x_quant=TOKEN)
    for rows in (3, 70):
        case = make_linear(spec, rows)
        case.check(on_fibers(spec, case.given)[0])


def test_a_norm_of_a_float32_sum_gives_float16(make_rows, on_fibers):
    """As between the residual stream and a linear."""
    spec = NormSpec(columns=300, kind="rms", epsilon=1e-5, residual=True, keep_sum=True, target=Target.CUDA)
    case = make_rows(spec.holding({"values": "float16"}), 3)
    results, _ = on_fibers(case.spec, case.given)
    assert (results["values"].dtype, results["sum"].dtype) == ("float16", "float32")
    assert (results["sum"] == case.given["x"] + case.given["residual"]).all()
    case.check(results, limit=2**-11)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_by_warp_shuffles(make_rows, on_fibers, dtype):
    """A block of several warps, and one of a single warp; they compute in float32 whatever they read."""
    for columns in (20, 300):
        given = {"columns": columns, "output": TOKEN, "dtype": dtype, "target": Target.CUDA}
        norm = NormSpec(kind="layer", epsilon=1e-5, bias=True, **given)
        for spec in (norm, ActivationSpec(activation="silu", gate="halves", **given)):
            case = make_rows(spec, 3)
            case.check(on_fibers(spec, case.given)[0], limit=2e-6)


WIDE = GemmConfig(block_m=32, block_n=64, block_k=32, warps_m=1, warps_n=2)
HIGH = GemmConfig(block_m=32, block_n=16, block_k=16, warps_m=2, warps_n=1)
BYTES_ALONE, HALVES = {"x_quant": STATIC}, {"weight": low_bit(4), "dtype": "float16"}


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        (BYTES_ALONE, WIDE),
        (HALVES, HIGH),
        pytest.param(BYTES_ALONE, HIGH, marks=pytest.mark.nightly),
        pytest.param(HALVES, WIDE, marks=pytest.mark.nightly),
    ],
    ids=["s8-wide", "w4-high", "s8-high", "w4-wide"],
)
def test_fragments_of_other_tiles(make_linear, on_fibers, changes, config):
    spec = replace(SPEC, **changes)
    assert "matrix_a" in device_source(spec, config=config)
    case = make_linear(spec, 35)
    case.check(on_fibers(spec, case.given, config)[0], limit=HALF)


@pytest.mark.parametrize(
    "changes",
    [{"x_quant": STATIC}, {"x_quant": QuantSpec(UINT8, Granularity.per_embedding_group(2))}],
    ids=["matrices", "bytes"],
)
def test_blocks_that_shared_memory_does_not_hold_are_refused(changes):
    with pytest.raises(
        BitlowerError, match=r"tiles of 960 x 960 results take \d+ bytes of shared memory, and cuda has"
    ):
        device_source(replace(SPEC, **changes), config=GemmConfig(block_m=960, block_n=960))
