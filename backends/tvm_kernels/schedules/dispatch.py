"""From a spec to the scheduled function of its target."""

from __future__ import annotations

from typing import Any

from bitlower.backends.tvm_kernels.schedules.cpu import linear as cpu_linear
from bitlower.backends.tvm_kernels.schedules.cpu import rowwise as cpu_rowwise
from bitlower.backends.tvm_kernels.schedules.generic import build
from bitlower.backends.tvm_kernels.schedules.gpu import linear as gpu_linear
from bitlower.backends.tvm_kernels.schedules.gpu import rowwise as gpu_rowwise
from bitlower.backends.tvm_kernels.spec.base import KernelSpec
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec


def lower(spec: KernelSpec) -> Any:
    """The scheduled PrimFunc of ``spec`` for its target.

    Raises:
        BitlowerError: the target has no kernel for it.
    """
    if not spec.target.on_cpu:
        return _lower_gpu(spec)
    match spec:
        case LinearSpec(layout=Layout.PANELS):
            return cpu_linear.lower_linear(spec)
        case NormSpec() | ActivationSpec():
            return cpu_rowwise.lower_rows(spec)
        case LinearSpec():
            return build(spec)
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")


def _lower_gpu(spec: KernelSpec) -> Any:
    match spec:
        case LinearSpec():
            return gpu_linear.lower_linear(spec)
        case NormSpec() | ActivationSpec():
            return gpu_rowwise.lower_rows(spec)
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")
