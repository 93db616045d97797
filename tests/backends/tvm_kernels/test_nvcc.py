"""What nvcc makes of the CUDA kernels: the matrix instructions are there, nothing spills, shared memory fits."""

from dataclasses import replace

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm

from bitlower.backends.tvm_kernels import ActivationSpec, LinearSpec, NormSpec, Target, device_source
from bitlower.backends.tvm_kernels.inspect.sass import device_functions
from bitlower.backends.tvm_kernels.library.fatbin import device_module
from bitlower.backends.tvm_kernels.library.nvcc import find_tool
from bitlower.backends.tvm_kernels.schedules.dispatch import lower_attention
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.ir import BitlowerError, CheckError, Granularity, Grid, QuantSpec

MISSING = [tool for tool in ("nvcc", "cuobjdump", "nvdisasm") if find_tool(tool) is None]
UINT8 = Grid(8, signed=False, symmetric=False)
STATIC, TOKEN = (QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
PEG = QuantSpec(UINT8, Granularity.per_embedding_group(3))
INT8 = QuantSpec(Grid(8), Granularity.per_channel(0))
BASE = LinearSpec(k=768, n=3072, weight=INT8, bias=True, target=Target.CUDA)


def low_bit(bits):
    return QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_group(128))


LINEARS = {
    "w8a8": (replace(BASE, x_quant=STATIC, activation="gelu", output=STATIC), "IMMA"),
    "w8a8-token": (replace(BASE, x_quant=TOKEN, residual=True), "IMMA"),
    "w8a8-peg": (replace(BASE, x_quant=PEG), "IDP.4A"),
    "w4a8": (replace(BASE, weight=low_bit(4), x_quant=TOKEN), "IDP.4A"),
    **{f"w{bits}a16": (replace(BASE, weight=low_bit(bits), dtype="float16"), "HMMA") for bits in (2, 3, 4)},
    "w4a16-residual": (
        replace(BASE, weight=low_bit(4), dtype="float16", residual=True).holding(
            {"bias": "float32", "residual": "float32", "values": "float32"}
        ),
        "HMMA",
    ),
    "w4a32": (replace(BASE, weight=low_bit(4)), "FFMA"),
    "f32": (replace(BASE, weight=None), "FFMA"),
    "f16": (replace(BASE, weight=None, dtype="float16"), "HMMA"),
}
ROWS = {
    "norm": NormSpec(
        columns=768, kind="layer", epsilon=1e-5, residual=True, bias=True, output=TOKEN, target=Target.CUDA
    ),
    "norm-f16": NormSpec(
        columns=2048, kind="rms", epsilon=1e-5, output=TOKEN, keep_sum=True, residual=True, dtype="float16",
        target=Target.CUDA,
    ),
    "activation": ActivationSpec(columns=3072, output=TOKEN, activation="silu", gate="halves", target=Target.CUDA),
}  # fmt: skip
HEADS = Attention(
    heads=12,
    kv_heads=12,
    head_dim=64,
    value_head_dim=64,
    factor=0.125,
    joined=True,
    mask="bool",
    mask_broadcast=(False, True, False, False),
)
HALVES = {"query": "float16", "key": "float16", "value": "float16", "result": "float16"}
ATTENTION = {
    "merged-f16": replace(HEADS, places=((2304, 0), (2304, 768), (2304, 1536)), **HALVES),
    "narrow": replace(HEADS, head_dim=48, value_head_dim=48, causal=True, mask="", mask_broadcast=()),
    "grouped-128-f16": replace(
        HEADS,
        heads=32,
        kv_heads=8,
        head_dim=128,
        value_head_dim=128,
        mask_broadcast=(True, True, True, False),
        **HALVES,
    ),
    "codes": replace(HEADS, scored=UINT8, probs=UINT8, query="uint8", key="uint8", value="uint8", output=UINT8),
}


def on_one_of_two(names):
    """Each name by one architecture in turn, so that both get each kind of instruction; by the other one nightly."""
    for place, name in enumerate(names):
        for number, architecture in enumerate(("sm_80", "sm_90")):
            yield pytest.param(name, architecture, marks=[pytest.mark.nightly] if place % 2 != number else [])


needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=f"CUDA kernels are NOT compiled: no {', '.join(MISSING)}")


@needs_nvcc
@pytest.mark.parametrize(("name", "architecture"), on_one_of_two(LINEARS))
def test_linears(name, architecture):
    spec, instruction = LINEARS[name]
    few, many = sorted(device_functions(device_source(spec), architecture), key=lambda f: f.name)
    assert (few.name, many.name) == (f"{spec.name}_kernel", f"{spec.name}_kernel_1")
    for function in (few, many):
        counts = dict(function.instructions)
        assert function.spills == 0
        assert not {"LDL", "STL"} & set(counts)
        assert function.registers <= 128
        assert function.shared <= 48 * 1024
    assert dict(many.instructions)[instruction] >= 16
    assert dict(few.instructions)["SHFL"] >= 5
    assert few.shared == 0
    if spec.x_quant is not None:
        assert dict(few.instructions)["IDP.4A"] >= 4


@needs_nvcc
@pytest.mark.parametrize(("name", "architecture"), on_one_of_two(ROWS))
def test_rows_are_one_device_function_without_spills(name, architecture):
    [function] = device_functions(device_source(ROWS[name]), architecture)
    assert function.spills == 0
    assert not {"LDL", "STL"} & set(dict(function.instructions))
    assert dict(function.instructions)["SHFL"] >= 5


@needs_nvcc
@pytest.mark.parametrize(("name", "architecture"), on_one_of_two(ATTENTION))
def test_attention_does_not_spill(name, architecture):
    module = tvm.IRModule({"attention": lower_attention(ATTENTION[name], Target.CUDA)})
    source = device_module(tvm.compile(module, target=tvm_target(Target.CUDA, architecture))).inspect_source()
    [function] = device_functions(str(source), architecture)
    assert function.spills == 0
    assert not {"LDL", "STL"} & set(dict(function.instructions))
    assert function.registers <= 168


@needs_nvcc
def test_what_does_not_compile_is_said():
    with pytest.raises(CheckError, match=r"nvcc failed: (?s:.)*nonsense"):
        device_functions("nonsense", "sm_80")


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr("bitlower.backends.tvm_kernels.inspect.sass.find_tool", lambda name: None)
    with pytest.raises(BitlowerError, match="nvcc is needed to look at machine code"):
        device_functions("// no such kernel", "sm_80")
