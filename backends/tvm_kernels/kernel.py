"""Specs to code that runs: the rules of each target, and a cache of compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from bitlower.backends.tvm_kernels.schedules.dispatch import lower
from bitlower.backends.tvm_kernels.spec.arguments import arguments
from bitlower.backends.tvm_kernels.spec.base import KernelSpec, kernel_name
from bitlower.backends.tvm_kernels.spec.target import GemmConfig
from bitlower.backends.tvm_kernels.target import ARCHITECTURE, host_target, runs_here, tvm_target
from bitlower.ir import BitlowerError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel of the host.

    Args:
        spec: what it computes.
        executable: TVM's, with one function.
        name: of the function.
    """

    spec: KernelSpec
    executable: Any
    name: str

    def __call__(self, operands: Mapping[str, Array]) -> dict[str, Array]:
        """Run on the arguments by name; the results by name.

        Raises:
            BitlowerError: an argument is missing, or has another dtype or shape than the spec says.
        """
        m = operands["ids" if "ids" in operands else "x"].shape[0]
        buffers, results = [], {}
        for argument in arguments(self.spec):
            shape = tuple(m if size is None else size for size in argument.shape)
            if argument.written:
                array = results[argument.name] = np.zeros(shape, argument.dtype)
            else:
                array = _checked(self.spec, operands, argument.name, argument.dtype, shape)
            buffers.append(tvm.runtime.tensor(array))
        self.executable[self.name](*buffers)
        names = [argument.name for argument in arguments(self.spec)]
        return {name: buffers[names.index(name)].numpy() for name in results}


def _checked(spec: KernelSpec, operands: Mapping[str, Array], name: str, dtype: str, shape: tuple[int, ...]) -> Array:
    array = operands.get(name)
    if array is None:
        raise BitlowerError(f"{spec.name} needs the argument {name!r}")
    if array.dtype != dtype or array.shape != shape:
        raise BitlowerError(f"{spec.name}: {name} is {dtype}{list(shape)}, not {array.dtype}{list(array.shape)}")
    return np.ascontiguousarray(array)


@cache
def compile_kernel(spec: KernelSpec, config: GemmConfig | None = None) -> Kernel:
    """The kernel of ``spec``, compiled for this host; equal specs and configurations share one.

    Args:
        spec: what it computes.
        config: how a linear does; None: as has served best on the target.

    Raises:
        BitlowerError: the target is no CPU, or none that this host is.
    """
    if spec.target.on_cpu and not runs_here(spec.target):
        raise BitlowerError(f"this processor does not run {spec.target} kernels", hint=f"compile for {host_target()}")
    if not spec.target.on_cpu:
        raise BitlowerError(
            f"{spec.target} kernels do not run on this host",
            hint=f"compile for {host_target()}, or see `device_source`",
        )
    name = kernel_name(spec, config or spec.target.gemm)
    executable = tvm.compile(tvm.IRModule({name: lower(spec, config)}), target=tvm_target(spec.target))
    return Kernel(spec, executable, name)


@cache
def device_source(spec: KernelSpec, architecture: str = ARCHITECTURE, config: GemmConfig | None = None) -> str:
    """The source of the device functions of a GPU kernel: CUDA C++ (for an architecture), or OpenCL C.

    Raises:
        BitlowerError: the target is no GPU, or has no kernel for the spec.
    """
    if spec.target.on_cpu:
        raise BitlowerError(f"{spec.target} kernels have no device functions", hint="see `compile_kernel`")
    module = tvm.IRModule({kernel_name(spec, config or spec.target.gemm): lower(spec, config)})
    executable = tvm.compile(module, target=tvm_target(spec.target, architecture))
    return str(executable.mod.imports[0].inspect_source())
