"""The CPU schedules, with AVX512-VNNI where this processor has it and without, against float64."""

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import tvm_ffi

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm

from bitlower.backends.tvm_kernels import (
    ActivationSpec,
    GemmConfig,
    Layout,
    LinearSpec,
    NormSpec,
    Target,
    arguments,
    compile_kernel,
    host_target,
    pack_linear,
)
from bitlower.backends.tvm_kernels.kernel import Kernel
from bitlower.backends.tvm_kernels.schedules.dispatch import lower
from bitlower.backends.tvm_kernels.spec.base import kernel_name
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec

TARGETS = [Target.LLVM, *([Target.VNNI] if host_target() is Target.VNNI else [])]
UINT8, INT8 = Grid(8, signed=False, symmetric=False), Grid(8)
STATIC, TOKEN = (QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
ACTIVATIONS = {
    "float": None,
    "static": STATIC,
    "token-s8": QuantSpec(INT8, Granularity.per_token()),
    "peg": QuantSpec(UINT8, Granularity.per_embedding_group(2)),
}
WEIGHTS = {
    "w8": QuantSpec(INT8, Granularity.per_channel(0)),
    "w4": QuantSpec(Grid(4), Granularity.per_group(32)),
    "w4-asym": QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_group(64)),
    "w3-asym": QuantSpec(Grid(3, symmetric=False), Granularity.per_group(32)),
    "w2": QuantSpec(Grid(2), Granularity.per_channel(0)),
}
SPEC = LinearSpec(k=128, n=75, weight=WEIGHTS["w8"], layout=Layout.PANELS, bias=True)
CONFIG = GemmConfig(row_tiles=(1, 4), many_rows=9)


@pytest.fixture(params=TARGETS, ids=str)
def each_target(request):
    """Where the instructions for products of bytes matter."""
    return request.param


@pytest.fixture(params=[*(pytest.param(t, marks=pytest.mark.nightly) for t in TARGETS[:-1]), TARGETS[-1]], ids=str)
def target(request):
    """What this processor runs; nightly also the code for any processor, which differs in the width of vectors."""
    return request.param


PAIRS = [(target, weight, activation) for target in TARGETS for weight in WEIGHTS for activation in ACTIVATIONS]
PLAIN = {("w8", "static"), ("w3-asym", "token-s8"), ("w4-asym", "float"), ("w4", "peg"), ("w2", "float")}
OTHERS = {("w8", "peg"), ("w4", "token-s8"), ("w4-asym", "static"), ("w3-asym", "peg"), ("w2", "static")}
"""With those above each weight has two kinds of activations, integers among them, and each kind of them two weights."""


@pytest.mark.parametrize(
    ("target", "weight", "activation"),
    [
        pytest.param(*pair, marks=[] if pair[1:] in PLAIN | OTHERS else [pytest.mark.nightly])
        for pair in PAIRS
        if pair[0] is Target.VNNI or pair[1:] in PLAIN
    ],
)
def test_linears_of_every_bucket(make_linear, target, weight, activation):
    """One function for all: 1 and 4 rows at a time, and from 9 on weights that are unfolded first."""
    spec = replace(SPEC, weight=WEIGHTS[weight], x_quant=ACTIVATIONS[activation], target=target)
    kernel = compile_kernel(spec, CONFIG)
    for rows in (1, 7, 14):
        case = make_linear(spec, rows)
        case.check(kernel(case.given))


def test_embedding_groups_that_are_no_multiple_of_weight_groups(make_linear, each_target):
    parts = QuantSpec(UINT8, Granularity.per_embedding_parts(2))
    spec = replace(SPEC, weight=WEIGHTS["w4"], x_quant=parts, splits=(40, 88), target=each_target)
    kernel = compile_kernel(spec, GemmConfig(row_tiles=(1,), many_rows=9))  # with one tile there is less to compile
    for rows in (3, 10):
        case = make_linear(spec, rows)
        case.check(kernel(case.given))


@pytest.mark.parametrize(
    "outputs", [16, 64, 129, *(pytest.param(size, marks=pytest.mark.nightly) for size in (70, 80))]
)
def test_ragged_outputs(make_linear, target, outputs):
    spec = replace(SPEC, n=outputs, x_quant=STATIC, residual=True, activation="gelu", target=target)
    for output in (None, STATIC):
        case = make_linear(replace(spec, output=output), 3)
        case.check(compile_kernel(case.spec, CONFIG)(case.given))


def test_output_scales_by_column(make_linear, each_target):
    output = QuantSpec(INT8, Granularity.per_embedding())
    spec = replace(SPEC, x_quant=STATIC, output=output, activation="silu", target=each_target)
    case = make_linear(spec, 3)
    case.check(compile_kernel(spec, CONFIG)(case.given))


def test_eight_bit_weights_beside_float_activations(make_linear, each_target):
    spec = replace(SPEC, weight=QuantSpec(UINT8, Granularity.per_group(64)), target=each_target)
    for rows in (3, 9):
        case = make_linear(spec, rows)
        case.check(compile_kernel(spec, CONFIG)(case.given))


def test_float_weights(make_linear, target):
    """Few rows and many, and outputs that fill no panel."""
    spec = replace(SPEC, weight=None, k=44, n=70, activation="gelu", target=target, layout=Layout.PANELS)
    for rows in (1, 3, 65):
        case = make_linear(spec, rows)
        case.check(compile_kernel(spec, CONFIG)(case.given))


def test_the_largest_codes_do_not_saturate(each_target):
    """Sums of products of bytes that a 16-bit accumulator would clip."""
    spec = replace(SPEC, x_quant=STATIC, bias=False, target=each_target)
    codes = np.full((75, 128), 127, np.int8)
    codes[1] = -128
    packed = pack_linear(spec, codes, np.float32(1), np.float32(0))
    ones = np.ones(1, np.float32)
    given = packed | {"x": np.full((2, 128), 255, np.uint8), "x_scale": ones, "x_zero": 0 * ones}
    values = compile_kernel(spec, CONFIG)(given)["values"]
    assert values[0, 0] == 255 * 127 * 128
    assert values[1, 1] == -255 * 128 * 128


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_give_the_same(make_linear, threads):
    spec = replace(SPEC, weight=WEIGHTS["w4-asym"], n=300, target=host_target())
    case = make_linear(spec, 13)
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(1, threads)
    assert tvm_ffi.get_global_func("runtime.NumThreads")() == threads
    found = compile_kernel(spec, CONFIG)(case.given)
    case.check(found)
    configure(1, 1)
    assert (found["values"] == compile_kernel(spec, CONFIG)(case.given)["values"]).all()


@pytest.mark.parametrize("columns", [16, 37, 96])
@pytest.mark.parametrize("output", [STATIC, TOKEN, QuantSpec(INT8, Granularity.per_embedding()), None], ids=str)
def test_norms(make_rows, target, columns, output):
    for kind in ("layer", "rms"):
        spec = NormSpec(
            columns=columns, kind=kind, epsilon=1e-6, residual=True, bias=kind == "layer", output=output,
            keep="exact" if output else "", keep_sum=True, target=target,
        )  # fmt: skip
        case = make_rows(spec, 5)
        results = compile_kernel(spec, CONFIG)(case.given)
        case.check(results, limit=2e-6)
        assert (results["sum"] == case.given["x"] + case.given["residual"]).all()


@pytest.mark.parametrize("gate", ["", "separate", "halves"])
@pytest.mark.parametrize("output", [STATIC, TOKEN], ids=str)
def test_activations(make_rows, target, gate, output):
    for function, columns in (("gelu", 33), ("silu", 64), ("gelu-tanh", 7), ("", 48)):
        spec = ActivationSpec(columns=columns, output=output, activation=function, gate=gate, bias=True, target=target)
        case = make_rows(spec, 3)
        case.check(compile_kernel(spec, CONFIG)(case.given), limit=2e-6)


@pytest.mark.parametrize("codes", [TOKEN, QuantSpec(INT8, Granularity.per_embedding())], ids=str)
def test_operands_that_are_codes(make_linear, make_rows, target, codes):
    linear = replace(
        SPEC, residual=True, residual_codes=codes, output=STATIC, keep="rounded", x_quant=TOKEN, target=target,
        rounded=STATIC,
    )  # fmt: skip
    norm = NormSpec(
        columns=37, kind="rms", epsilon=1e-5, x_codes=codes, residual=True, residual_codes=codes, output=TOKEN,
        keep="rounded", target=target,
    )  # fmt: skip
    activation = ActivationSpec(
        columns=37, activation="tanh", x_codes=codes, gate="separate", gate_codes=codes, residual=True,
        residual_codes=codes, output=STATIC, keep="exact", target=target,
    )  # fmt: skip
    for make, spec in ((make_linear, linear), (make_rows, norm), (make_rows, activation)):
        case = make(spec, 5)
        case.check(compile_kernel(spec, CONFIG)(case.given), limit=2e-6)


@pytest.mark.skipif(host_target() is not Target.VNNI, reason="this processor has no AVX512-VNNI")
@pytest.mark.parametrize("weight", ["w8", "w4"])
def test_vnni_is_in_the_code(weight):
    spec = replace(SPEC, weight=WEIGHTS[weight], x_quant=STATIC, target=Target.VNNI)
    assert "vpdpbusd" in compile_kernel(spec, CONFIG).executable.mod.inspect_source("asm")
    plain = compile_kernel(replace(spec, target=Target.LLVM), CONFIG).executable.mod.inspect_source("asm")
    assert "zmm" not in plain


def test_sums_live_in_registers(each_target):
    """Scratch memory is only for weights that are unfolded for many rows."""
    spec = replace(SPEC, x_quant=STATIC, residual=True, activation="gelu", output=STATIC, target=each_target)
    assert "AllocWorkspace" not in compile_kernel(spec, CONFIG).executable.mod.inspect_source("asm")


@pytest.mark.parametrize("activation", ["float", "peg"])
@pytest.mark.parametrize("weight", ["w4", "w4-asym", "w3-asym", "w2"])
def test_one_row_asks_memory_for_what_it_reads_later(weight, activation):
    """For the lines of one later step of codes, and for the scales and zero points that belong to them."""
    spec = replace(SPEC, k=256, weight=WEIGHTS[weight], x_quant=ACTIVATIONS[activation])
    asked = _prefetched(spec)
    ahead, step = min(asked["weight"]), 64 * spec.step * spec.bits // 8
    assert asked["weight"] == set(range(ahead, ahead + step, 64))
    assert 4096 <= ahead <= 8192
    if spec.grouped or activation == "float":
        group = max(1, ahead // (64 * spec.group_size * spec.bits // 8))
        assert asked["weight_scale"] == {256 * group + line for line in (0, 64, 128, 192)}
        assert asked.get("weight_zero", {64 * group}) == {64 * group}
        assert ("weight_zero" in asked) == spec.has_zeros


def _prefetched(spec):
    """The bytes that are asked for at the first turn of all loops, by the name of the argument."""
    found = defaultdict(set)
    for number, place in re.findall(r"T\.address_of\(buffer_(\d+)\[(.+)\]\)", lower(spec, CONFIG).script()):
        argument, at = arguments(spec)[int(number)], 0
        for index, size in zip(place.split(", "), argument.shape, strict=True):
            at = at * size + sum(map(int, re.findall(r"(?:^| \+ )T\.int64\((\d+)\)", index)))
        found[argument.name].add(at * np.dtype(argument.dtype).itemsize)
    return found


@pytest.mark.skipif(host_target() is not Target.VNNI, reason="this processor has no AVX512-VNNI")
@pytest.mark.parametrize("weight", ["w8", "w4"])
def test_only_narrow_codes_are_asked_for(weight):
    """Others come fast enough by themselves."""
    spec = replace(SPEC, weight=WEIGHTS[weight], x_quant=STATIC, target=Target.VNNI)
    assert ("prefetcht0" in compile_kernel(spec, CONFIG).executable.mod.inspect_source("asm")) == (weight == "w4")


def test_wrong_arguments_are_named(make_linear):
    case = make_linear(replace(SPEC, target=host_target()), 2)
    kernel = compile_kernel(case.spec, CONFIG)
    with pytest.raises(BitlowerError, match=r"x is float32\[2, 128\], not float64\[2, 128\]"):
        kernel(case.given | {"x": case.given["x"].astype(np.float64)})
    with pytest.raises(BitlowerError, match="needs the argument 'bias'"):
        kernel({name: value for name, value in case.given.items() if name != "bias"})


def test_functions_bear_what_they_are():
    function = lower(SPEC)
    assert function.attrs["bitlower.family"] == "linear"
    assert function.attrs["global_symbol"] == SPEC.name
    assert compile_kernel(SPEC) is compile_kernel(replace(SPEC))


def test_two_configurations_of_one_spec_stand_side_by_side(make_linear, each_target):
    """In one module, each under its own name, with tiles of rows and a threshold of its own."""
    spec = replace(SPEC, weight=WEIGHTS["w4-asym"], x_quant=STATIC, target=each_target)
    configs = (CONFIG, GemmConfig(row_tiles=(1, 2), many_rows=4, prefetch_bytes=128))
    names = [kernel_name(spec, config) for config in configs]
    functions = {name: lower(spec, config) for name, config in zip(names, configs, strict=True)}
    executable = tvm.compile(tvm.IRModule(functions), target=tvm_target(each_target))
    for rows in (1, 5):
        case = make_linear(spec, rows)
        for name in names:
            case.check(Kernel(spec, executable, name)(case.given))
