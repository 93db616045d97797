"""Low-bit kernels that TVM generates: one spec, one kernel, for the CPU and for GPUs.

A spec says what a kernel computes (:class:`LinearSpec`, :class:`NormSpec`, :class:`ActivationSpec`,
:class:`EmbeddingSpec`), :func:`pack_linear` brings a weight into the form that it reads, :func:`arguments` lists what
it takes, and :func:`compile_kernel` gives it. TVM (the extra ``tvm``) is imported by what compiles, and only there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from bitlower.backends.tvm_kernels._compile import Kernel

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
    "device_source",
    "host_target",
    "pack_linear",
    "pack_vector",
    "require_tvm",
    "unpack_linear",
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
