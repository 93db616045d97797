"""A target is one row: what it has decides the code, and nothing is OpenCL because it is not CUDA."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm

from bitlower.backends.tvm_kernels import GemmConfig, LinearSpec, Target, compile_kernel, device_source
from bitlower.backends.tvm_kernels.library.fatbin import device_module
from bitlower.backends.tvm_kernels.relax.pipeline import lowering
from bitlower.backends.tvm_kernels.relax.program import fuse_module
from bitlower.backends.tvm_kernels.spec.target import TARGETS, find_target
from bitlower.backends.tvm_kernels.target import host_target, runs_here, tvm_target
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
STATIC = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
SPEC = LinearSpec(k=64, n=40, weight=QuantSpec(Grid(8), Granularity.per_channel(0)), x_quant=STATIC)
TOY = Target(
    name="toy-gpu",
    kind="opencl",
    device="opencl",
    byte_products="dp4a",
    options=(("thread_warp_size", 1), ("max_num_threads", 256)),
    needs="a toy",
    gemm=GemmConfig(many_rows=4, block_m=16, block_n=32, warps_m=1),
)
"""OpenCL with an instruction for products of bytes, and tiles of its own."""


def test_a_new_gpu_computes_with_what_its_row_says(make_linear, on_pocl) -> None:
    spec = replace(SPEC, target=TOY)
    assert "__dp4a" in device_source(spec)
    assert "__dp4a" not in device_source(replace(SPEC, target=Target.OPENCL))
    assert "matrix_a" not in device_source(spec)
    for rows in (2, 19):
        case = make_linear(spec, rows)
        case.check(on_pocl(spec, case.given)[0])


def test_whole_programs_compile_for_it() -> None:
    program, device = _HELPERS["fused"]("bert", "W8A8", layers=1), tvm_target(TOY)
    executable = tvm.compile(fuse_module(program, TOY, device), target=device, relax_pipeline=lowering(TOY))
    assert "__dp4a" in device_module(executable).inspect_source()


def test_a_processor_without_the_features_of_a_target_does_not_run_it(make_linear) -> None:
    """One that has them does, whatever its name is."""
    ones = (Target(name="one", kind="llvm", device="cpu", features=(name,)) for name in ("sse2", "neon"))
    [feature] = [target.features[0] for target in ones if runs_here(target)]
    known = Target(name="toy-cpu", kind="llvm", device="cpu", features=(feature,))
    case = make_linear(replace(SPEC, target=known), 3)
    case.check(compile_kernel(case.spec)(case.given))
    strange = Target(name="strange-cpu", kind="llvm", device="cpu", features=("amx-complex", "neon", "sse2"))
    assert not runs_here(strange)
    with pytest.raises(BitlowerError, match="this processor does not run strange-cpu kernels"):
        compile_kernel(replace(SPEC, target=strange))


def test_the_host_is_the_target_with_most_of_its_features() -> None:
    best = host_target()
    assert runs_here(best)
    assert all(len(t.features) <= len(best.features) for t in TARGETS.values() if runs_here(t))


def test_names_are_found_and_the_nearest_is_named() -> None:
    assert [find_target(name) for name in TARGETS] == list(TARGETS.values())
    assert [str(target) for target in TARGETS.values()] == list(TARGETS)
    with pytest.raises(BitlowerError, match=r"unknown target 'cudda'.*did you mean 'cuda'"):
        find_target("cudda")
