"""Specs: equality, names, segments, and what they refuse."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bitlower.backends.tvm_kernels import ActivationSpec, Layout, LinearSpec, NormSpec, Target, arguments
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.spec.base import ACTIVATION_FUNCTIONS, KernelSpec, kernel_name
from bitlower.backends.tvm_kernels.spec.linear import table_spec
from bitlower.backends.tvm_kernels.spec.target import TARGETS, GemmConfig
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, ScaleConvention

UINT8 = Grid(8, signed=False, symmetric=False)
TENSOR = QuantSpec(UINT8, Granularity.per_tensor())
INT8 = QuantSpec(Grid(8), Granularity.per_channel(0))
INT4 = QuantSpec(Grid(4), Granularity.per_group(32))
SPEC = LinearSpec(k=96, n=8, weight=INT4)


def test_equal_specs_are_one_key_and_different_ones_are_not():
    same = LinearSpec(k=96, n=8, weight=QuantSpec(Grid(4), Granularity.per_group(32)))
    assert same == SPEC
    assert hash(same) == hash(SPEC)
    assert same.name == SPEC.name
    others = [replace(SPEC, **change) for change in (
        {"k": 64}, {"bias": True}, {"x_quant": TENSOR}, {"layout": Layout.PANELS}, {"target": Target.CUDA},
        {"dtype": "float16"}, {"activation": "gelu"}, {"output": TENSOR},
    )]  # fmt: skip
    assert len({spec.name for spec in [SPEC, *others]}) == len(others) + 1
    assert all(spec.name.isidentifier() for spec in others)


def test_names_say_what_profilers_are_read_for():
    assert re.fullmatch(r"bitlower_linear_n8_k96_w4g32_f32_[0-9a-f]{8}", SPEC.name)
    rounded = replace(SPEC, weight=INT8, x_quant=QuantSpec(UINT8, Granularity.per_token()), activation="gelu-tanh")
    assert rounded.name.startswith("bitlower_linear_n8_k96_w8_u8token_gelu_tanh_")
    assert NormSpec(columns=8, kind="rms", epsilon=1e-5, output=TENSOR).name.startswith("bitlower_norm_rms_8_u8tensor_")
    assert ActivationSpec(columns=8, activation="silu").name.startswith("bitlower_activation_silu_8_f32_")
    attention = Attention(heads=4, kv_heads=2, head_dim=64, value_head_dim=64, factor=0.125, query="uint8")
    assert attention.name.startswith("bitlower_attention_h4kv2x64_uint8_")


def test_a_configuration_of_its_own_is_in_the_name():
    other = GemmConfig(row_tiles=(1, 4))
    assert kernel_name(SPEC, SPEC.target.gemm) == SPEC.name
    assert kernel_name(SPEC, other) not in (SPEC.name, kernel_name(SPEC, GemmConfig(row_tiles=(1, 8))))
    assert kernel_name(SPEC, other).rpartition("_")[0] == SPEC.name.rpartition("_")[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row_tiles": (2, 4)}, "must rise from 1"),
        ({"row_tiles": (1, 4, 2)}, "must rise from 1"),
        ({"many_rows": 0}, "at least 1"),
        ({"block_m": 48, "warps_m": 2}, "48 is no multiple of 16 for each of 2 warps"),
        ({"block_k": 24}, "16, 32 and 64"),
    ],
)
def test_configurations_are_checked(fields, message):
    with pytest.raises(BitlowerError, match=message):
        GemmConfig(**fields)


def test_what_has_no_kernel_is_a_reason_and_what_makes_no_sense_an_error():
    sixteen = QuantSpec(Grid(16), Granularity.per_tensor())
    assert NormSpec.plan(columns=8, kind="rms", epsilon=1e-5, output=sixteen) == (
        "codes between kernels have at most 8 bits, not 16"
    )
    assert NormSpec.plan(columns=8, kind="rms", epsilon=1e-5) == NormSpec(columns=8, kind="rms", epsilon=1e-5)
    with pytest.raises(BitlowerError, match="unknown norm"):
        NormSpec.plan(columns=8, kind="batch", epsilon=1e-5)


def test_dtypes_name_what_differs_in_one_way():
    half = replace(SPEC, dtype="float16", residual=True)
    given = half.holding({"values": "float32", "x": "float16", "residual": "float32"})
    assert given == half.holding({"residual": "float32", "values": "float32"})
    assert half.holding({"x": "float16"}) == half
    dtypes = {argument.name: argument.dtype for argument in arguments(given)}
    assert (dtypes["x"], dtypes["residual"], dtypes["values"]) == ("float16", "float32", "float32")
    assert given.name != half.name


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (32, 32, 32)),
        ({"weight": INT8}, (96,)),
        ({"weight": INT8, "x_quant": QuantSpec(UINT8, Granularity.per_embedding_group(4))}, (24, 24, 24, 24)),
        ({"x_quant": QuantSpec(UINT8, Granularity.per_embedding_group(2))}, (32, 16, 16, 32)),
        ({"x_quant": QuantSpec(UINT8, Granularity.per_embedding_parts(2)), "splits": (8, 88)}, (8, 24, 32, 32)),
        ({"k": 80, "weight": QuantSpec(Grid(4), Granularity.per_group(32))}, (16,) * 5),
    ],
)
def test_segments_end_where_a_scale_changes(changes, sizes):
    assert replace(SPEC, **changes).segment_sizes == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": QuantSpec(Grid(4), Granularity.per_channel(1))}, "a weight quantized per-channel"),
        ({"weight": QuantSpec(Grid(12), Granularity.per_tensor())}, "at most 8 bits"),
        ({"x_quant": QuantSpec(Grid(16), Granularity.per_tensor())}, "at most 8 bits"),
        ({"output": QuantSpec(UINT8, Granularity.per_token())}, "the output of a linear quantized per-token"),
        ({"x_quant": INT8}, "an activation quantized per-channel"),
        ({"weight": None, "x_quant": TENSOR}, "no product of codes with float weights"),
        ({"activation": "gleu"}, "did you mean 'gelu'"),
        ({"splits": (8, 8)}, "do not add up to 96"),
        ({"dtype": "float64"}, "not in float64"),
        ({"dtypes": (("x", "float64"),)}, "not in float64"),
        ({"output": TENSOR, "keep": "exakt"}, "did you mean 'exact'"),
        ({"weight": QuantSpec(UINT8, Granularity.per_channel(0)), "x_quant": TENSOR}, "no integer product"),
        ({"weight": QuantSpec(Grid(8, signed=False), Granularity.per_channel(0))}, "no integer product"),
        ({"layout": Layout.PANELS, "k": 36, "weight": QuantSpec(Grid(2), Granularity.per_tensor())}, "rows-1"),
    ],
)
def test_what_no_kernel_can_do_is_refused(changes, message):
    with pytest.raises(BitlowerError, match=message):
        replace(SPEC, **changes)


def test_offset_codes_of_eight_bits_fit_a_signed_byte():
    grid = Grid(8, signed=False, convention=ScaleConvention.OFFSET)
    spec = replace(SPEC, weight=QuantSpec(grid, Granularity.per_channel(0)), x_quant=TENSOR)
    assert (spec.centre, spec.has_zeros) == (128, False)


def test_norms_activations_and_tables_are_checked_too():
    with pytest.raises(BitlowerError, match="did you mean 'layer'"):
        NormSpec(columns=8, kind="layr", epsilon=1e-5, output=TENSOR)
    with pytest.raises(BitlowerError, match="nothing to keep exact values beside"):
        NormSpec(columns=8, kind="rms", epsilon=1e-5, keep="exact")
    with pytest.raises(BitlowerError, match="has no residual, but a quantizer of it"):
        NormSpec(columns=8, kind="rms", epsilon=1e-5, residual_codes=TENSOR)
    with pytest.raises(BitlowerError, match="unknown gate"):
        ActivationSpec(columns=8, output=TENSOR, gate="half")
    with pytest.raises(BitlowerError, match="a result quantized"):
        ActivationSpec(columns=8, output=INT4)
    with pytest.raises(BitlowerError, match="at most 8 bits"):
        table_spec((4, 8), QuantSpec(Grid(16), Granularity.per_tensor()))


def test_the_page_on_kernels_lists_what_there_is():
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    for spec in (LinearSpec, NormSpec, ActivationSpec):
        [listed] = re.findall(rf"^\| `{spec.__name__}` \|.*\| (.*?) \|$", page, re.MULTILINE)
        own = [field.name for field in fields(spec) if field.name not in {f.name for f in fields(KernelSpec)}]
        assert re.findall(r"`(\w+)`", listed) == own
    [activations] = re.findall(r"^Activations: (.*?)\. ", page, re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", activations) == [name for name in ACTIVATION_FUNCTIONS if name]
    for heading, names in (("Layouts", Layout), ("Targets", TARGETS)):
        section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == set(map(str, names))
