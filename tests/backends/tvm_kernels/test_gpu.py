"""The GPU schedules, thread for thread, in OpenCL on the CPU, against float64."""

from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import (
    ActivationSpec,
    GemmConfig,
    Layout,
    LinearSpec,
    NormSpec,
    Target,
    compile_kernel,
    device_source,
    host_target,
)
from bitlower.backends.tvm_kernels.spec.base import kernel_name
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec

UINT8, INT8 = Grid(8, signed=False, symmetric=False), Grid(8)
STATIC, TOKEN = (QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
PEG = QuantSpec(UINT8, Granularity.per_embedding_group(2))
ACTIVATIONS = {"float": None, "static": STATIC, "token-s8": QuantSpec(INT8, Granularity.per_token()), "peg": PEG}
WEIGHTS = {
    "w8": QuantSpec(INT8, Granularity.per_channel(0)),
    "w4-asym": QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_group(64)),
    "w3": QuantSpec(Grid(3), Granularity.per_group(32)),
    "w2-asym": QuantSpec(Grid(2, symmetric=False), Granularity.per_channel(0)),
}
SPEC = LinearSpec(k=192, n=70, weight=WEIGHTS["w8"], bias=True, target=Target.OPENCL)


TWICE = {
    *(("float", weight) for weight in ("w4-asym", "w2-asym")),
    *(("static", weight) for weight in ("w8", "w3")),
    *(("token-s8", weight) for weight in ("w4-asym", "w3")),
    *(("peg", weight) for weight in ("w8", "w2-asym")),
}
"""Each weight with two kinds of activations, each of these with two weights."""


@pytest.mark.parametrize(
    ("activation", "weight"),
    [
        pytest.param(*pair, marks=[] if pair in TWICE else [pytest.mark.nightly])
        for pair in product(ACTIVATIONS, WEIGHTS)
    ],
)
def test_linears_with_few_rows_and_many(make_linear, on_pocl, weight, activation):
    """One function: below eight rows a warp an output, from there on tiles, of which the last ones are ragged."""
    spec = replace(SPEC, weight=WEIGHTS[weight], x_quant=ACTIVATIONS[activation])
    for rows, kernel in ((1, "kernel"), (5, "kernel"), (67, "kernel_1")):
        case = make_linear(spec, rows)
        results, launched = on_pocl(spec, case.given)
        case.check(results)
        assert launched == [f"{spec.name}_{kernel}"]


@pytest.mark.parametrize("activation", ["peg", "token-s8"])
def test_products_of_bytes_as_cuda_has_them(make_linear, on_pocl, activation):
    """The CUDA kernels call ``__dp4a``, which OpenCL is given by hand."""
    spec = replace(SPEC, weight=WEIGHTS["w4-asym"], x_quant=ACTIVATIONS[activation], target=Target.CUDA)
    assert "__dp4a" in device_source(spec)
    for rows in (2, 65):
        case = make_linear(spec, rows)
        case.check(on_pocl(spec, case.given)[0])


@pytest.mark.parametrize("rows", [3, 66])
def test_epilogues(make_linear, on_pocl, rows):
    spec = replace(
        SPEC, x_quant=STATIC, activation="gelu", residual=True, residual_codes=TOKEN, output=STATIC, keep="rounded"
    )
    case = make_linear(spec, rows)
    case.check(on_pocl(spec, case.given)[0])


def test_groups_of_other_sizes(make_linear, on_pocl):
    """Groups too small for wide loads, and inputs that no group size divides."""
    grid = Grid(2, symmetric=False)
    for spec in (
        replace(SPEC, weight=QuantSpec(grid, Granularity.per_group(8)), x_quant=STATIC),
        replace(SPEC, k=200, weight=QuantSpec(Grid(4), Granularity.per_group(64)), x_quant=STATIC),
        replace(SPEC, x_quant=QuantSpec(UINT8, Granularity.per_embedding_parts(2)), splits=(20, 172)),
    ):
        for rows in (2, 17):
            case = make_linear(spec, rows)
            case.check(on_pocl(spec, case.given)[0])


def test_float_weights(make_linear, on_pocl):
    for inputs in (192, 36):
        spec = replace(SPEC, k=inputs, weight=None, activation="gelu", output=STATIC)
        for rows in (2, 67):
            case = make_linear(spec, rows)
            case.check(on_pocl(spec, case.given)[0])


@pytest.mark.parametrize("columns", [48, 300, 1100])
@pytest.mark.parametrize("output", [None, STATIC, TOKEN], ids=str)
def test_norms_are_one_kernel(make_rows, on_pocl, columns, output):
    for kind in ("layer", "rms"):
        spec = NormSpec(
            columns=columns, kind=kind, epsilon=1e-5, residual=True, bias=kind == "layer", output=output,
            keep="exact" if output else "", keep_sum=True, target=Target.CUDA,
        )  # fmt: skip
        case = make_rows(spec, 4)
        results, launched = on_pocl(spec, case.given)
        case.check(results, limit=2e-6)
        assert len(launched) == 1
        assert (results["sum"] == case.given["x"] + case.given["residual"]).all()


@pytest.mark.parametrize(("function", "gate"), [("silu", "halves"), ("gelu", ""), ("gelu-tanh", "separate"), ("", "")])
def test_activations_are_one_kernel(make_rows, on_pocl, function, gate):
    for output in (STATIC, TOKEN):
        spec = ActivationSpec(columns=300, output=output, activation=function, gate=gate, bias=True, target=Target.CUDA)
        case = make_rows(spec, 3)
        results, launched = on_pocl(spec, case.given)
        case.check(results, limit=2e-6)
        assert len(launched) == 1


WIDE = GemmConfig(many_rows=2, block_m=16, block_n=48, block_k=16, warps_m=1, warps_n=1)
HIGH = GemmConfig(many_rows=1, block_m=32, block_n=16, block_k=64, warps_m=1, warps_n=1)


@pytest.mark.parametrize(
    ("activation", "config"),
    [
        ("peg", WIDE),
        ("float", HIGH),
        pytest.param("peg", HIGH, marks=pytest.mark.nightly),
        pytest.param("float", WIDE, marks=pytest.mark.nightly),
    ],
    ids=["peg-wide", "float-high", "peg-high", "float-wide"],
)
def test_tiles_of_other_sizes(make_linear, on_pocl, activation, config):
    """They compute the same under another name."""
    spec = replace(SPEC, weight=WEIGHTS["w4-asym"], x_quant=ACTIVATIONS[activation])
    case = make_linear(spec, 35)
    results, launched = on_pocl(spec, case.given, config)
    case.check(results)
    assert launched[0].startswith(kernel_name(spec, config))
    assert kernel_name(spec, config) != spec.name


def test_what_gpus_have_no_kernel_for_is_said():
    with pytest.raises(BitlowerError, match="read weights in rows-1"):
        device_source(replace(SPEC, layout=Layout.PANELS))
    with pytest.raises(BitlowerError, match="do not run on this host"):
        compile_kernel(SPEC)
    with pytest.raises(BitlowerError, match="have no device functions"):
        device_source(replace(SPEC, target=host_target()))
