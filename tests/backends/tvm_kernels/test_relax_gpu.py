"""Whole fused programs with GPU schedules, run on the CPU: the numbers are those of the program that PyTorch runs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import torch
import tvm
from tvm import te

from bitlower.backends.tvm_kernels import Library, Target
from bitlower.backends.tvm_kernels.inspect.launches import Launch, launches_of
from bitlower.backends.tvm_kernels.library.library import Code
from bitlower.backends.tvm_kernels.schedules.gpu.fallback import launches, schedule
from bitlower.backends.tvm_kernels.spec.operators import families
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.backends.tvm_kernels.verify.trace import KernelComparison, trace
from bitlower.ir import BitlowerError, CheckError
from bitlower.ir.observe import run
from bitlower.passes import Context, PassManager, parse_pipeline

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
TOLERANCE, fused, tokens, worst, next_step = (
    _HELPERS[name] for name in ("TOLERANCE", "fused", "tokens", "worst", "next_step")
)
LAYERS = 2
HALF = 8 * LAYERS * 2.0**-11
"""Of an output's standard deviation: values, weights and results are rounded to 11 bits eight times a layer or more,
each by 2⁻¹¹ at most; not all of them in the same direction."""


@pytest.mark.parametrize("scheme", ["W8A8-full", pytest.param("W8A8-token", marks=pytest.mark.nightly)])
def test_an_encoder_in_opencl(pocl: Any, scheme: str) -> None:
    """So many rows that linears go by tiles, and a single one."""
    program = fused("bert", scheme)
    library = pocl.library(program)
    for rows, length in ((1, 1), (4, 19))[scheme != "W8A8-full" :]:
        assert worst(program, library, tokens(program, rows, length, seed=5)) < TOLERANCE
    assert families(library.launches)["attention"] == LAYERS
    counted = launches_of(program, {"batch": 4, "sequence": 19}, Target.OPENCL)
    assert sum(call.count for call in counted) == len(library.launches)
    assert any(name.endswith("_kernel_1") for name in library.launches)


@pytest.mark.parametrize("scheme", [pytest.param("W8A8", marks=pytest.mark.nightly), "W4A16-g16"])
def test_a_decoder_in_opencl_reads_a_text_and_goes_on(pocl: Any, scheme: str) -> None:
    program = fused("llama", scheme)
    library = pocl.library(program)
    batch = tokens(program, 2, 5)
    assert worst(program, library, batch) < TOLERANCE
    assert worst(program, library, next_step(program, batch, library(**batch))) < TOLERANCE


def test_an_encoder_in_cuda(fibers: Any) -> None:
    """With int8 matrices, shuffles and products of bytes."""
    program = fused("bert", "W8A8")
    library = fibers.library(program, "float32")
    assert worst(program, library, tokens(program, 4, 19, seed=5)) < TOLERANCE


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.nightly)])
def test_a_decoder_in_cuda_with_float16_between_kernels(fibers: Any, model: str) -> None:
    """A text by matrix instructions and a step from its cache, kernel by kernel and as a whole."""
    program = fused(model, "W4A16-g32")
    library = fibers.library(trace(program))
    batch = tokens(program, 2, 9)
    for given, tiles in ((batch, True), (next_step(program, batch, library(**batch)), False)):
        given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
        found, comparison = library(**given), KernelComparison(program, "float16")
        linears = [name for name in library.launches if name.startswith("bitlower_linear")]
        assert linears
        assert all(name.endswith("_kernel_1") == tiles for name in linears)
        comparison.run(program.arguments(given), found)
        assert not list(filter(None, (kernel.problem() for kernel in comparison.agreements.values())))
        with torch.no_grad():
            expected = program(**given)
        for name, value in expected.items():
            assert found[name].dtype == (torch.float32 if name == "logits" else torch.float16)
            assert (found[name] - value).abs().max() < HALF * value.std()


def test_an_encoder_decoder_in_cuda_with_float16_between_kernels(fibers: Any, seq2seq: Any) -> None:
    """Two functions, of which the second reads keys and values of the first in float32, and its own in float16."""
    passes = parse_pipeline("clean,quantize{scheme=W4A16-g16},rtn,lower-integer,fuse")
    program = PassManager(passes).run(seq2seq.traced("t5"), Context())
    library = fibers.library(program)
    [batch] = seq2seq.batches("t5", 1, padded=False)
    expected = run(program, batch)
    found = library(**{name: value for name, value in batch.items() if name != "decoder_attention_mask"})
    assert families(library.launches)["attention"] == 3 * LAYERS
    for name, value in expected.items():
        own = ".decoder." in name
        assert found[name].dtype == (torch.float16 if own else torch.float32)
        assert (found[name] - value).abs().max() < HALF * value.std()


@pytest.mark.parametrize(
    ("model", "scheme", "layer"), [("bert", "W8A8", 7), ("bert", "W8A8-token", 9), ("llama", "W4A16-g16", 11)]
)
def test_launches_of_a_layer(model: str, scheme: str, layer: int) -> None:
    """Merged layers are read where they lie: none is cut, no head is moved, a gate is the half of a row."""
    sizes = {"batch": 2, "sequence": 7, "past": 0}
    one, two = (launches_of(fused(model, scheme, layers=count), sizes) for count in (1, 2))
    assert sum(call.count for call in two) - sum(call.count for call in one) == layer


def test_bytes_of_a_launch() -> None:
    """The merged linear of queries, keys and values: codes, weight, scales, sums and bias, and float results."""
    rows, inputs, outputs = 14, 32, 96
    read = rows * inputs + 2 * 4 + outputs * inputs + 3 * 4 * outputs
    for activations, width in (("float32", 4), ("float16", 2)):
        calls = launches_of(fused("bert", "W8A8"), {"batch": 2, "sequence": 7}, Target.CUDA, activations)
        linear = next(call for call in calls if call.name.startswith("bitlower_linear"))
        assert linear == Launch(linear.name, 1, read, width * rows * outputs)


def test_a_function_without_a_schedule_is_refused() -> None:
    device = tvm_target(Target.CUDA)
    x = te.placeholder((4,), name="x")
    function = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1.0)])
    module = schedule(tvm.IRModule({"plus": function}), device)
    assert launches(module["plus"]) == 1
    with pytest.raises(CheckError, match="the function plus of the library has no schedule"):
        schedule(tvm.IRModule({"plus": function.with_attr("bitlower.family", "sum")}), device)


@pytest.mark.parametrize("target", [Target.CUDA, Target.OPENCL])
def test_a_library_does_not_run_without_its_device(target: Target) -> None:
    if (tvm.cuda() if target is Target.CUDA else tvm.opencl()).exist:
        pytest.skip("there is such a device")
    library = Library(Code(None, target), fused("bert", "W8A8"))
    with pytest.raises(BitlowerError, match=f"code for {target}, and TVM finds no such device here"):
        library(**tokens(library.program, 1, 4))
