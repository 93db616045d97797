"""From a spec to the scheduled function of its target."""

from __future__ import annotations

from typing import Any

from bitlower.backends.tvm_kernels.schedules.cpu import attention as cpu_attention
from bitlower.backends.tvm_kernels.schedules.cpu import linear as cpu_linear
from bitlower.backends.tvm_kernels.schedules.cpu import rowwise as cpu_rowwise
from bitlower.backends.tvm_kernels.schedules.generic import build
from bitlower.backends.tvm_kernels.schedules.gpu import attention as gpu_attention
from bitlower.backends.tvm_kernels.schedules.gpu import linear as gpu_linear
from bitlower.backends.tvm_kernels.schedules.gpu import rowwise as gpu_rowwise
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.spec.base import KernelSpec, kernel_name
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.spec.target import AttentionConfig, GemmConfig, Target


def lower(spec: KernelSpec, config: GemmConfig | None = None) -> Any:
    """The scheduled PrimFunc of ``spec`` for its target.

    Args:
        spec: what it computes.
        config: how a linear does; None: as has served best on the target.

    Raises:
        NoKernel: the target has no kernel for it.
    """
    config = config or spec.target.gemm
    if not spec.target.on_cpu:
        return _lower_gpu(spec, config)
    match spec:
        case LinearSpec(layout=Layout.PANELS):
            return cpu_linear.lower_linear(spec, config)
        case NormSpec() | ActivationSpec():
            return cpu_rowwise.lower_rows(spec)
        case LinearSpec():
            return build(spec, kernel_name(spec, config))
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")


def _lower_gpu(spec: KernelSpec, config: GemmConfig) -> Any:
    match spec:
        case LinearSpec():
            return gpu_linear.lower_linear(spec, config)
        case NormSpec() | ActivationSpec():
            return gpu_rowwise.lower_rows(spec)
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")


def lower_attention(what: Attention, target: Target, config: AttentionConfig | None = None) -> Any:
    """The scheduled PrimFunc of an attention, with the arguments that its operands have.

    Args:
        what: it computes.
        target: whose code.
        config: how it is computed; None: as has served best on the target.
    """
    config = config or target.attention
    return cpu_attention.attention(what, config) if target.on_cpu else gpu_attention.attention(what, target, config)
