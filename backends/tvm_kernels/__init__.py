"""Low-bit kernels that TVM generates, one spec, one kernel, for CPUs and for GPUs; and whole Programs.

A spec says what a kernel computes (:class:`LinearSpec`, :class:`NormSpec`, :class:`ActivationSpec`),
:func:`pack_linear` brings a weight into the form that it reads, :func:`arguments` lists what it takes, and
:func:`compile_kernel` gives it. :func:`compile_program` makes a library of a Program at level fused, and :func:`export`
a folder, which :func:`load_library` and :func:`verify` read without the Program. TVM (the extra ``tvm``) is imported by
what compiles or runs, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlower.backends.tvm_kernels.backend import ExportReport, TvmKernels
from bitlower.backends.tvm_kernels.library.library import Library, StagedLibrary, is_library
from bitlower.backends.tvm_kernels.pins import require_tvm
from bitlower.backends.tvm_kernels.spec.arguments import Argument, arguments
from bitlower.backends.tvm_kernels.spec.base import KernelSpec
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import pack_linear, pack_vector, unpack_linear
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.spec.target import AttentionConfig, GemmConfig, Target
from bitlower.backends.tvm_kernels.verify.artifact import ArtifactReport
from bitlower.backends.tvm_kernels.verify.artifact import verify_artifact as verify
from bitlower.backends.tvm_kernels.verify.record import Verification
from bitlower.ir import Batch, Program

if TYPE_CHECKING:
    from bitlower.backends.tvm_kernels.kernel import Kernel

__all__ = [
    "ActivationSpec",
    "Argument",
    "ArtifactReport",
    "AttentionConfig",
    "ExportReport",
    "GemmConfig",
    "KernelSpec",
    "Layout",
    "Library",
    "LinearSpec",
    "NormSpec",
    "StagedLibrary",
    "Target",
    "TvmKernels",
    "Verification",
    "arguments",
    "compile_kernel",
    "compile_program",
    "device_source",
    "export",
    "host_target",
    "is_library",
    "load_library",
    "pack_linear",
    "pack_vector",
    "require_tvm",
    "unpack_linear",
    "verify",
]


def compile_kernel(spec: KernelSpec, config: GemmConfig | None = None) -> Kernel:
    """The kernel of ``spec``, compiled for this host; equal specs and configurations share one.

    Args:
        spec: what it computes.
        config: how a linear does; None: as has served best on the target.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, or the target is no CPU.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import kernel

    return kernel.compile_kernel(spec, config)


def device_source(spec: KernelSpec, architecture: str = "sm_80", config: GemmConfig | None = None) -> str:
    """The source of the device functions of a GPU kernel: CUDA C++ (for an architecture), or OpenCL C.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, the target is no GPU, or has no kernel for it.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import kernel

    return kernel.device_source(spec, architecture, config)


def host_target() -> Target:
    """The best CPU target that this processor can run.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels import target

    return target.host_target()


def compile_program(
    program: Program,
    target: Target | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    activations: str = TvmKernels.activations,
) -> Library | StagedLibrary:
    """A Program at level fused as a library in memory, which is called as the Program is.

    Args:
        program: with one graph; an encoder-decoder becomes two functions, ``encoder`` and ``decoder``.
        target: whose code; None: the best CPU that this processor is.
        sizes: symbolic dimensions that are known already, by name.
        activations: see :class:`TvmKernels`.

    Raises:
        BitlowerError: TVM is not installed in the pairing that works, or the program cannot be compiled.
        CheckError: a function for a GPU has no schedule, or its code does not compile.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels.library import compile as compiling

    return compiling.compile_program(program, target, sizes=sizes, activations=activations)


def load_library(folder: Path) -> Library | StagedLibrary:
    """The library in a folder that :func:`export` wrote; nothing is loaded before all files have the manifest's hashes.

    Raises:
        BitlowerError: TVM is not installed, or the library is code for another processor.
        CheckError: a file is missing or changed, or is not listed in the manifest.
    """
    return TvmKernels.load(folder)


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> ExportReport:
    """:meth:`TvmKernels.export` with ``options``."""
    return TvmKernels(**options).export(program, folder, batches, provenance)
