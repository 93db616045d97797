"""Random operands of a spec, the float64 result of them, and the comparison of codes up to ties."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitlower.backends.tvm_kernels import (
    ActivationSpec,
    LinearSpec,
    NormSpec,
    Target,
    arguments,
    pack_linear,
    pack_vector,
)
from bitlower.backends.tvm_kernels.spec.base import kernel_name, static_scales
from bitlower.backends.tvm_kernels.spec.packing import pack_float

os.environ["TVM_NUM_THREADS"] = "2"  # else OMP_NUM_THREADS is the most that TVM will use
Array = np.ndarray[Any, Any]
reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))
Operand = reference.Operand


@dataclass
class Case:
    """Arguments of a kernel by name, and what it must give.

    Args:
        given: the arguments.
        wanted: float64 results before rounding, [rows, columns].
        size: the magnitude that errors are measured against, as ``wanted``.
    """

    spec: Any
    given: dict[str, Array]
    wanted: Array
    size: Array

    def check(self, results: dict[str, Array], *, limit: float = 1e-6) -> None:
        """Values are within ``limit`` of the size; codes equal but for ties that this error can turn over."""
        output = getattr(self.spec, "output", None)
        if output is not None:
            self._check_codes(output, results, limit)
        if output is None or self.spec.keep:
            wanted = self.wanted
            if self.spec.keep == "rounded":
                wanted = Operand(results["codes"], *self._scales(output, results)).values()
            error = np.abs(results["values"].astype(np.float64) - wanted) / self.size
            assert error.max() < limit, f"relative error {error.max():.1e}"

    def _scales(self, output: Any, results: dict[str, Array]) -> tuple[Array, Array]:
        if output.granularity.dynamic:
            return results["out_scale"][:, None], results["out_zero"][:, None]
        return self.given["out_scale"][None], self.given["out_zero"][None]

    def _check_codes(self, output: Any, results: dict[str, Array], limit: float) -> None:
        scale, zero = self._scales(output, results)
        if output.granularity.dynamic:
            wanted_scale, wanted_zero = reference.row_ranges(output, self.wanted.astype(np.float32))
            slack = limit * self.size.max(-1, keepdims=True)
            assert (np.abs(scale - wanted_scale) * (2**output.grid.bits - 1) <= 4 * slack + 1e-6 * wanted_scale).all()
            assert (np.abs(zero - wanted_zero) <= 1).all()
        ratio = reference.ratio(self.wanted, scale, zero)
        low, high = output.grid.quant_min, output.grid.quant_max
        slack = limit * self.size / reference.ratio(np.ones_like(ratio), 1 / np.asarray(scale), np.zeros_like(zero))
        near = np.abs(ratio - np.floor(ratio) - 0.5) <= slack + 1e-6
        wanted = np.clip(np.round(ratio), low, high)
        wrong = (results["codes"] != wanted) & ~near
        assert not wrong.any(), f"{wrong.mean():.1%} of the codes are wrong"
        assert (np.abs(results["codes"] - wanted) <= 1).all()
        assert near.mean() < 0.2


def _codes(random: np.random.Generator, grid: Any, shape: tuple[int, ...]) -> Array:
    return random.integers(grid.quant_min, grid.quant_max + 1, shape).astype(np.int8 if grid.signed else np.uint8)


def weight_of(spec: LinearSpec, random: np.random.Generator) -> Operand:
    """Random codes with a scale (and zero point) for each output and group."""
    shape = (spec.n, spec.k // spec.group_size)
    scale = random.uniform(0.01, 0.02, shape).astype(np.float32)
    grid = spec.weight.grid
    zero = np.full(shape, spec.centre, np.float32)
    if not grid.symmetric:
        zero = random.integers(grid.quant_min, grid.quant_max + 1, shape).astype(np.float32)
    return Operand(_codes(random, grid, (spec.n, spec.k)), scale, zero)


def _activation_of(spec: LinearSpec, rows: int, random: np.random.Generator) -> tuple[Any, dict[str, Array]]:
    if spec.x_quant is None:
        x = random.standard_normal((rows, spec.k)).astype(spec.dtype_of("x"))
        return x, {"x": x}
    count = rows if spec.x_quant.granularity.dynamic else len(spec.x_group_sizes)
    scale = random.uniform(0.01, 0.05, count).astype(np.float32)
    grid = spec.x_quant.grid
    zero = np.zeros(count, np.float32)
    if not grid.symmetric:
        zero = random.integers(grid.quant_min + 30, grid.quant_max - 30, count).astype(np.float32)
    codes = _codes(random, grid, (rows, spec.k))
    given = {"x": codes, "x_scale": scale, "x_zero": zero}
    if spec.x_quant.granularity.dynamic:
        return Operand(codes, scale[:, None], zero[:, None]), given
    spread = [np.repeat(part, spec.x_group_sizes)[None] for part in (scale, zero)]
    return Operand(codes, *spread), given


def linear_case(spec: LinearSpec, rows: int, seed: int = 0) -> Case:
    """A random linear."""
    random = np.random.default_rng(seed)
    x, given = _activation_of(spec, rows, random)
    if spec.weight is None:
        weight: Any = random.standard_normal((spec.n, spec.k)).astype(spec.dtype)
        given |= pack_float(spec, weight)
    else:
        weight = weight_of(spec, random)
        given |= pack_linear(spec, weight.codes, weight.scale, weight.zero_point)
    extra: dict[str, Array] = {}
    if spec.bias:
        extra["bias"] = random.standard_normal(spec.n).astype(spec.dtype_of("bias"))
        given["bias"] = pack_vector(spec, extra["bias"])
    product = replace(spec, residual=False, residual_codes=None)
    wanted = reference.linear(product, x, weight, **extra)
    real = x.values() if isinstance(x, Operand) else x.astype(np.float64)
    size = np.abs(real) @ np.abs(weight.values() if isinstance(weight, Operand) else weight.astype(np.float64)).T + 1
    if spec.rounded is not None:
        wanted, rounding = _rounded(spec, wanted)
        given |= rounding
    if spec.residual:
        dtype = spec.dtype_of("residual")
        residual, held = operand("residual", spec.residual_codes, dtype, (rows, spec.n), random)
        given |= held
        wanted = wanted + (residual.values() if isinstance(residual, Operand) else residual)
    return Case(spec, given | ranges(spec, wanted), wanted, size)


def _rounded(spec: LinearSpec, product: Array) -> tuple[Array, dict[str, Array]]:
    """The product as its rounding leaves it, on a grid so coarse that every value can be told from a tie."""
    assert spec.rounded is not None
    scale, zero = np.array([np.abs(product).max() / 100], np.float32), np.array([3], np.float32)
    values = reference.fake(spec.rounded, product, scale[None], zero[None])
    return values, {"rounded_scale": scale, "rounded_zero": zero}


def operand(
    name: str, quantizer: Any, dtype: str, shape: tuple[int, int], random: np.random.Generator
) -> tuple[Any, dict[str, Array]]:
    """A random float operand, or codes, and its arguments."""
    if quantizer is None:
        x = (2 * random.standard_normal(shape)).astype(dtype)
        return x, {name: x}
    codes = _codes(random, quantizer.grid, shape)
    dynamic = quantizer.granularity.dynamic
    count = shape[0] if dynamic else static_scales(quantizer, shape[1])
    scale = random.uniform(0.01, 0.05, count).astype(np.float32)
    zero = random.integers(-5, 6, count).astype(np.float32)
    given = {name: codes, f"{name}_scale": scale, f"{name}_zero": zero}
    at = (slice(None), None) if dynamic else (None, slice(None))
    return Operand(codes, scale[at], zero[at]), given


def ranges(spec: Any, wanted: Array) -> dict[str, Array]:
    """Scales of a static output quantizer that clip a little."""
    shapes = {a.name: a.shape for a in arguments(spec) if not a.written}
    if "out_scale" not in shapes:
        return {}
    (count,) = shapes["out_scale"]
    grid = spec.output.grid
    scale = np.full(count, 0.9 * np.abs(wanted).max() / 2 ** (grid.bits - 1), np.float32)
    scale *= np.linspace(1, 1.3, count).astype(np.float32)
    middle = 0 if grid.symmetric else (grid.quant_min + grid.quant_max + 1) // 2
    return {"out_scale": scale, "out_zero": np.full(count, middle, np.float32)}


def row_case(spec: NormSpec | ActivationSpec, rows: int, seed: int = 0) -> Case:
    """A random norm or activation; the first row of float operands is zero."""
    random = np.random.default_rng(seed)
    given: dict[str, Array] = {}
    named: dict[str, Any] = {}
    for argument in arguments(spec):
        name, shape = argument.name, tuple(rows if size is None else size for size in argument.shape)
        if argument.written or name.endswith(("_scale", "_zero")):
            continue
        if len(shape) == 2:
            named[name], held = operand(name, getattr(spec, f"{name}_codes"), argument.dtype, shape, random)
            given |= held
            if rows > 1 and not isinstance(named[name], Operand):
                named[name][0] = 0
        else:
            named[name] = given[name] = random.standard_normal(shape).astype(argument.dtype)
    wanted = (reference.norm if isinstance(spec, NormSpec) else reference.activation)(spec, **named)
    return Case(spec, given | ranges(spec, wanted), wanted, np.abs(wanted) + np.abs(wanted).max())


@pytest.fixture(scope="session")
def make_linear():
    """``make_linear(spec, rows, seed=0)``: a :class:`Case` of a linear."""
    return linear_case


@pytest.fixture(scope="session")
def make_rows():
    """``make_rows(spec, rows, seed=0)``: a :class:`Case` of a norm or an activation."""
    return row_case


@pytest.fixture(scope="session")
def make_weight():
    """``make_weight(spec, random)``: a random weight."""
    return weight_of


@cache
def _load(name: str) -> dict[str, Any]:
    """What a file beside this one defines."""
    return runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))


def _hosted(name: str) -> Any:
    """A function that runs the device code of a spec by one of the files beside this one."""
    from bitlower.backends.tvm_kernels.schedules.dispatch import lower

    emulator, make = _load(name), _load("hosted")["HostedKernel"]
    compiled: dict[Any, Any] = {}

    def run(spec: Any, given: dict[str, Array], config: Any = None) -> tuple[dict[str, Array], list[str]]:
        import tvm

        name = kernel_name(spec, config or spec.target.gemm)
        if name not in compiled:
            compiled[name] = make(lower(spec, config), name, emulator["TARGET"], emulator["build"])
        rows = given["ids" if "ids" in given else "x"].shape[0]
        held = {}
        for a in arguments(spec):
            shape = tuple(rows if size is None else size for size in a.shape)
            held[a.name] = tvm.runtime.tensor(np.zeros(shape, a.dtype) if a.written else given[a.name])
        compiled[name](*held.values())
        results = {a.name: held[a.name].numpy() for a in arguments(spec) if a.written}
        return results, compiled[name].launches

    return run


@dataclass(frozen=True)
class Emulated:
    """A GPU whose device functions one of the files beside this one runs."""

    name: str

    def kernel(self, function: Any, name: str) -> Any:
        """A scheduled PrimFunc as a function of CPU tensors."""
        emulator = _load(self.name)
        return _load("hosted")["HostedKernel"](function, name, emulator["TARGET"], emulator["build"])

    def library(self, program: Any, activations: str = "auto") -> Any:
        """A fused Program as a library with GPU schedules; called as the Program is, it notes its ``launches``."""
        target = Target.OPENCL if self.name == "pocl" else Target.CUDA
        return _load("hosted")["HostedLibrary"](program, target, _load(self.name)["build"], activations)


@pytest.fixture(scope="session")
def pocl(on_pocl):
    """OpenCL on the CPU."""
    return Emulated("pocl")


@pytest.fixture(scope="session")
def fibers(on_fibers):
    """CUDA source compiled by g++."""
    return Emulated("fibers")


@pytest.fixture(scope="session")
def on_pocl():
    """``on_pocl(spec, given, config=None)``: results of a GPU kernel by PoCL, and which device functions ran."""
    if importlib.util.find_spec("pyopencl") is None:
        pytest.skip("GPU schedules are NOT tested: pip install pyopencl")
    try:
        return _hosted("pocl")
    except Exception as error:
        pytest.skip(f"GPU schedules are NOT tested: pip install pocl-binary-distribution; {error}")


@pytest.fixture(scope="session")
def on_fibers():
    """``on_fibers(spec, given, config=None)``: the same of CUDA source, by g++."""
    if shutil.which("g++") is None:
        pytest.skip("kernels in float16 and with matrix instructions are NOT tested: install g++")
    return _hosted("fibers")
