"""A compiled Program, which is called as the Program is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitlower.backends.running import GraphModel, StagedModel
from bitlower.backends.tvm_kernels.pins import require_tvm
from bitlower.backends.tvm_kernels.spec.functions import MAIN
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog, families
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import is_file
from bitlower.ir.generation import Decode
from bitlower.ir.stages import DECODER, ENCODER, enters_cross, whole_inputs

LIBRARY, SIGNATURE = "library.so", "library.json"
"""The code with the weights; what it takes, returns and runs on."""
RUNTIME = "TVM"


def is_library(folder: Path) -> bool:
    """Whether a library lies in ``folder``."""
    return is_file(folder / SIGNATURE)


def has_device(target: Target) -> bool:
    """Whether TVM finds a device for code of a target here."""
    return bool(_device(target).exist)


def _device(target: Target) -> Any:
    tvm = require_tvm()
    return getattr(tvm, target.device)()


def find_device(target: Target) -> Any:
    """TVM's device for code of a target.

    Raises:
        BitlowerError: this machine has none, or TVM cannot use it.
    """
    device = _device(target)
    if not device.exist:
        raise BitlowerError(
            f"this library is code for {target}, and TVM finds no such device here",
            hint=f"run it where there is {target.needs}, or compile for a CPU",
        )
    return device


@dataclass(frozen=True)
class Code:
    """What TVM compiled, where it runs.

    Args:
        executable: what TVM compiled, or a library that was loaded.
        target: whose code it is.
        operators: what became of the Program's operators.
    """

    executable: Any
    target: Target = Target.LLVM
    operators: OperatorLog = field(default_factory=OperatorLog)

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

    def kernel_calls(self) -> Counter[str]:
        """How often kernels of each family are called, counted in the code of TVM's virtual machine."""
        from bitlower.backends.tvm_kernels.internals import called_functions

        return families(called_functions(self.executable))

    def watch(self, observer: Callable[..., int]) -> None:
        """Let ``observer(function, name, before, result, *arguments)`` be called around each function from now on."""
        self._machine.set_instrument(observer)

    def put(self, value: torch.Tensor, dtype: torch.dtype) -> Any:
        """A tensor in the memory of TVM on the device; floats become ``dtype``."""
        import tvm

        value = value.to(dtype) if value.is_floating_point() else value
        return tvm.runtime.tensor(np.ascontiguousarray(value.numpy()), self.device)

    def call(self, function: str, program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of a function, tensors of TVM by name; of its inputs those that are such already stay.

        Args:
            function: its name.
            program: whose inputs and outputs it has.
            inputs: by name.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        values = [
            self.put(value, spec.type.dtype) if isinstance(value, torch.Tensor) else value
            for spec, value in zip(program.inputs, program.arguments(inputs), strict=True)
        ]
        results = self._machine[function](*values)
        return {spec.name: value for spec, value in zip(program.outputs, results, strict=True)}


@dataclass(frozen=True)
class Library(GraphModel):
    """A compiled Program.

    Args:
        code: whose function ``main`` it is.
        program: whose inputs and outputs it has; one that has no graphs will do.
    """

    code: Code
    program: Program
    runtime = RUNTIME

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _tensors(self.run(inputs))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same with outputs as tensors of TVM, which may be inputs of the next run: a cache is not copied.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return self.code.call(MAIN, self.program, inputs)


@dataclass(frozen=True)
class StagedLibrary(StagedModel):
    """A compiled encoder-decoder: one library of two functions, which share kernels, tables and weights.

    Args:
        code: whose functions ``encoder`` and ``decoder`` they are.
        program: what both together take and return; it has no graphs.
        stages: the same of each alone, by name.
    """

    code: Code
    program: Program
    stages: Mapping[str, Program]
    runtime = RUNTIME

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keys and values of cross-attention, from the source.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _tensors(self.code.call(ENCODER, self.stages[ENCODER], inputs))

    def decode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits and the decoder's own keys and values; names are those of the function ``decoder``.

        A past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _tensors(self.code.call(DECODER, self.stages[DECODER], inputs))

    def decoding(self) -> Decode:
        """:meth:`decode` for the steps of one call of :meth:`generate`.

        Its own cache stays where TVM has it, and what the encoder gave is put there once.
        """
        decoder = self.stages[DECODER]
        dtypes = {spec.name: spec.type.dtype for spec in decoder.inputs if enters_cross(spec.name)}
        cross: dict[str, tuple[Any, Any]] = {}

        def decode(batch: Mapping[str, Any]) -> dict[str, Any]:
            for name, dtype in dtypes.items():
                value = batch[name]
                if name not in cross or cross[name][0] is not value:
                    cross[name] = value, self.code.put(value, dtype)
            return self.code.call(DECODER, decoder, {**batch, **{name: stored for name, (_, stored) in cross.items()}})

        return decode


def staged_library(code: Code, whole: Program, stages: Mapping[str, Program]) -> StagedLibrary:
    """The library of an encoder-decoder.

    Args:
        code: with both functions.
        whole: its configuration, files and limits.
        stages: what each function takes and returns, by name.
    """
    encoder, decoder = stages[ENCODER], stages[DECODER]
    inputs, outputs = whole_inputs(encoder.inputs, decoder.inputs), (*decoder.outputs, *encoder.outputs)
    return StagedLibrary(code, replace(whole, graphs={}, inputs=inputs, outputs=outputs), stages)


def _tensors(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.numpy()) for name, value in values.items()}
