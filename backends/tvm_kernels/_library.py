"""A compiled Program, which is called as the Program is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitlower.backends.running import GraphModel
from bitlower.backends.tvm_kernels._spec import Target
from bitlower.backends.tvm_kernels._tvm import require_tvm
from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import is_file

LIBRARY, SIGNATURE = "library.so", "library.json"
"""The code with the weights; what it takes, returns and runs on."""


def is_library(folder: Path) -> bool:
    """Whether a library lies in ``folder``."""
    return is_file(folder / SIGNATURE)


def has_device(target: Target) -> bool:
    """Whether TVM finds a device for code of a target here."""
    return bool(_device(target).exist)


def _device(target: Target) -> Any:
    tvm = require_tvm()
    if target.on_cpu:
        return tvm.cpu()
    return tvm.cuda() if target is Target.CUDA else tvm.opencl()


def find_device(target: Target) -> Any:
    """TVM's device for code of a target.

    Raises:
        BitlowerError: this machine has none, or TVM cannot use it.
    """
    device = _device(target)
    if not device.exist:
        needed = "a GPU with its driver and libcudart.so.13" if target is Target.CUDA else "a TVM with OpenCL"
        raise BitlowerError(
            f"this library is code for {target}, and TVM finds no such device here",
            hint=f"run it where there is {needed}, or compile for a CPU",
        )
    return device


@dataclass(frozen=True)
class Library(GraphModel):
    """A compiled Program.

    Args:
        executable: what TVM compiled, or a library that was loaded.
        program: whose inputs and outputs it has; one that has no graphs will do.
        target: whose code it is.
    """

    executable: Any
    program: Program
    target: Target = Target.LLVM
    runtime = "TVM"

    @cached_property
    def device(self) -> Any:
        """Where it runs.

        Raises:
            BitlowerError: this machine has no such device.
        """
        return find_device(self.target)

    @cached_property
    def _machine(self) -> Any:
        device = self.device
        from tvm import relax

        return relax.VirtualMachine(self.executable, device)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return {name: torch.from_numpy(value.numpy()) for name, value in self.run(inputs).items()}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same with outputs as tensors of TVM, which may be inputs of the next run: a cache is not copied.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        given = [
            _held(value, spec.type.dtype, self.device)
            for spec, value in zip(self.inputs, self.program.arguments(inputs), strict=True)
        ]
        found = self._machine["main"](*given)
        return {spec.name: value for spec, value in zip(self.outputs, found, strict=True)}


def _held(value: Any, dtype: torch.dtype, device: Any) -> Any:
    """A tensor of TVM on the device; floats become those that the library takes."""
    if not isinstance(value, torch.Tensor):
        return value
    import tvm

    value = value.to(dtype) if value.is_floating_point() else value
    return tvm.runtime.tensor(np.ascontiguousarray(value.numpy()), device)
