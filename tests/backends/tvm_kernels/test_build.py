"""Kernels for any CPU, weights in rows, against float64: widths, groups, zero points, granularities, ragged rows."""

from dataclasses import replace

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import ActivationSpec, LinearSpec, NormSpec, compile_kernel
from bitlower.backends.tvm_kernels.spec.base import ACTIVATION_FUNCTIONS
from bitlower.ir import Granularity, Grid, QuantSpec, ScaleConvention

UINT8, INT8 = Grid(8, signed=False, symmetric=False), Grid(8)
ACTIVATIONS = {
    "float": None,
    "static": QuantSpec(UINT8, Granularity.per_tensor()),
    "static-s8": QuantSpec(INT8, Granularity.per_tensor()),
    "token": QuantSpec(UINT8, Granularity.per_token()),
    "peg": QuantSpec(UINT8, Granularity.per_embedding_group(3)),
}
WEIGHTS = {
    "w8": QuantSpec(INT8, Granularity.per_channel(0)),
    "w6": QuantSpec(Grid(6), Granularity.per_channel(0)),
    "w4": QuantSpec(Grid(4), Granularity.per_group(32)),
    "w4-asym": QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_group(16)),
    "w4-offset": QuantSpec(Grid(4, signed=False, convention=ScaleConvention.OFFSET), Granularity.per_channel(0)),
    "w3-asym": QuantSpec(Grid(3, symmetric=False), Granularity.per_group(32)),
    "w2": QuantSpec(Grid(2, restricted=True), Granularity.per_group(48)),
}
SPEC = LinearSpec(k=96, n=20, weight=WEIGHTS["w8"], bias=True)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linears(make_linear, weight, activation):
    spec = replace(SPEC, weight=WEIGHTS[weight], x_quant=ACTIVATIONS[activation])
    case = make_linear(spec, 5)
    case.check(compile_kernel(spec)(case.given))


@pytest.mark.parametrize("rows", [1, 17])
def test_rows_are_known_at_run_time(make_linear, rows):
    case = make_linear(SPEC, rows)
    case.check(compile_kernel(SPEC)(case.given))


def test_unequal_embedding_groups_and_groups_that_divide_nothing(make_linear):
    parts = QuantSpec(UINT8, Granularity.per_embedding_parts(3))
    spec = replace(SPEC, x_quant=parts, splits=(7, 9, 80))
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given))
    spec = replace(SPEC, k=80, weight=QuantSpec(Grid(4), Granularity.per_group(32)))
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given))


def test_eight_bit_weights_with_zero_points_of_their_own(make_linear):
    spec = replace(SPEC, weight=QuantSpec(UINT8, Granularity.per_group(32)))
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given))


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
def test_epilogues(make_linear, activation):
    spec = replace(SPEC, x_quant=ACTIVATIONS["static"], activation=activation, residual=True)
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given))
    for output in (ACTIVATIONS["static"], QuantSpec(INT8, Granularity.per_embedding_group(4))):
        rounded = replace(spec, output=output)
        case = make_linear(rounded, 4)
        case.check(compile_kernel(rounded)(case.given))


def test_half_precision_sums_in_single(make_linear):
    spec = replace(SPEC, weight=WEIGHTS["w4"], dtype="float16")
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given), limit=1e-3)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    "output", [None, *(QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_embedding_group(3)))]
)
def test_norms(make_rows, kind, output):
    keep = "exact" if output else ""
    spec = NormSpec(columns=48, kind=kind, epsilon=1e-5, residual=True, bias=True, output=output, keep=keep)
    case = make_rows(spec, 5)
    case.check(compile_kernel(spec)(case.given), limit=2e-6)


@pytest.mark.parametrize("codes", [ACTIVATIONS["token"], QuantSpec(INT8, Granularity.per_embedding_group(4))], ids=str)
def test_operands_that_are_codes(make_linear, make_rows, codes):
    """The residual of a linear, and what norms and activations read; the float result is that of the codes."""
    linear = replace(SPEC, residual=True, residual_codes=codes, output=ACTIVATIONS["static"], keep="rounded")
    norm = NormSpec(
        columns=48, kind="layer", epsilon=1e-5, x_codes=codes, residual=True, residual_codes=codes,
        output=ACTIVATIONS["token"], keep="rounded",
    )  # fmt: skip
    activation = ActivationSpec(
        columns=48, activation="silu", x_codes=codes, gate="separate", gate_codes=codes, residual=True,
        residual_codes=codes, output=ACTIVATIONS["static"], keep="rounded",
    )  # fmt: skip
    for make, spec in ((make_linear, linear), (make_rows, norm), (make_rows, activation)):
        case = make(spec, 5)
        case.check(compile_kernel(spec)(case.given), limit=2e-6)


def test_a_rounding_before_the_residual(make_linear):
    spec = replace(SPEC, x_quant=ACTIVATIONS["static"], rounded=ACTIVATIONS["static"], residual=True)
    case = make_linear(spec, 4)
    case.check(compile_kernel(spec)(case.given), limit=2e-6)


GRIDS = [UINT8, INT8, Grid(4, symmetric=False), *(Grid(8, convention=c) for c in list(ScaleConvention)[1:3])]
GRIDS += [Grid(8, signed=False), Grid(8, signed=False, convention=ScaleConvention.OFFSET)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_norms_with_a_range_for_each_row(make_rows, grid):
    output = QuantSpec(grid, Granularity.per_token())
    spec = NormSpec(columns=40, kind="layer", epsilon=1e-5, output=output, keep_sum=True, residual=True)
    case = make_rows(spec, 6)
    results = compile_kernel(spec)(case.given)
    case.check(results, limit=2e-6)
    assert (results["sum"] == case.given["x"] + case.given["residual"]).all()
    assert results["out_scale"][0] == 1


@pytest.mark.parametrize("activation", ACTIVATION_FUNCTIONS)
@pytest.mark.parametrize("gate", ["", "separate", "halves"])
def test_activations(make_rows, activation, gate):
    for granularity in (Granularity.per_token(), Granularity.per_tensor()):
        spec = ActivationSpec(
            columns=33, output=QuantSpec(UINT8, granularity), activation=activation, gate=gate, bias=True
        )
        case = make_rows(spec, 4)
        case.check(compile_kernel(spec)(case.given), limit=2e-6)
