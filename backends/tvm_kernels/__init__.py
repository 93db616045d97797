"""Low-bit kernels that TVM generates, one spec, one kernel, for CPUs and for GPUs; and whole Programs for the CPU.

A spec says what a kernel computes (:class:`LinearSpec`, :class:`NormSpec`, :class:`ActivationSpec`,
:class:`EmbeddingSpec`), :func:`pack_linear` brings a weight into the form that it reads, :func:`arguments` lists what
it takes, and :func:`compile_kernel` gives it. :func:`compile_program` makes a library of a Program at level fused, and
:func:`write_library` a folder, which :func:`load_library` and :func:`verify_library` read without the Program. TVM (the
extra ``tvm``) is imported by what compiles, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlower.backends.tvm_kernels._arguments import Argument, arguments
from bitlower.backends.tvm_kernels._packing import pack_linear, pack_vector, unpack_linear
from bitlower.backends.tvm_kernels._spec import (
    ActivationSpec,
    EmbeddingSpec,
    KernelSpec,
    Layout,
    LinearSpec,
    NormSpec,
    Target,
)
from bitlower.backends.tvm_kernels._tvm import require_tvm
from bitlower.ir import Batch, Program

if TYPE_CHECKING:
    from bitlower.backends.tvm_kernels._compile import Kernel
    from bitlower.backends.tvm_kernels._relax import Library
    from bitlower.backends.tvm_kernels._relax_library import LibraryReport

__all__ = [
    "ActivationSpec",
    "Argument",
    "EmbeddingSpec",
    "KernelSpec",
    "Layout",
    "LinearSpec",
    "NormSpec",
    "Target",
    "arguments",
    "compile_kernel",
    "compile_program",
    "device_source",
    "host_target",
    "load_library",
    "pack_linear",
    "pack_vector",
    "require_tvm",
    "unpack_linear",
    "verify_library",
    "write_library",
]


def compile_kernel(spec: KernelSpec) -> Kernel:
    """The kernel of ``spec``, compiled for this host; equal specs share one.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, or the target is no CPU.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _compile

    return _compile.compile_kernel(spec)


def device_source(spec: KernelSpec, architecture: str = "sm_80") -> str:
    """The source of the device functions of a GPU kernel: CUDA C++ (for an architecture), or OpenCL C.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, the target is no GPU, or has no kernel for it.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _compile

    return _compile.device_source(spec, architecture)


def host_target() -> Target:
    """The best CPU target that this processor can run.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _cpu_frame

    return _cpu_frame.host_target()


def compile_program(program: Program, target: Target | None = None) -> Library:
    """A Program at level fused as a library in memory, which is called as the Program is.

    Args:
        program: with one graph.
        target: a CPU; None: the best that this processor has.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, or the program cannot be compiled.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _relax

    return _relax.compile_program(program, target)


def write_library(
    program: Program,
    folder: Path,
    batches: Sequence[Batch],
    *,
    target: Target | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> LibraryReport:
    """Compile ``program`` into the existing ``folder`` and compare what lies there with it on ``batches``.

    Args:
        program: at level fused.
        folder: exists.
        batches: real inputs; the first also makes the self-test.
        target: a CPU; None: the best that this processor has.
        provenance: for the manifest; plain data.

    Raises:
        BitlowerError: TVM is not installed, there is no batch, or the program cannot be compiled.
        CheckError: the library does not compute what the program does.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _relax_library

    return _relax_library.write_library(program, folder, batches, target=target, provenance=provenance)


def load_library(folder: Path) -> Library:
    """The library in a folder that :func:`write_library` wrote.

    Raises:
        BitlowerError: TVM is not installed, or the library is code for another processor.
        CheckError: a file is missing or damaged.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _relax_library

    return _relax_library.load_library(folder)


def verify_library(folder: Path) -> dict[str, float]:
    """Check a folder without the Program; the cosine of each output to what was recorded when it was written.

    Raises:
        BitlowerError: TVM is not installed, there is no such folder, or it is code for another processor.
        CheckError: a file is missing or changed, or the library gives something else than it did.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import _relax_library

    return _relax_library.verify_library(folder)
