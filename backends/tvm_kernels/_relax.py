"""A fused Program as a Relax module, compiled for the CPU, and run by TVM's virtual machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax

from bitlower.backends.tvm_kernels._cpu_frame import host_target, tvm_target
from bitlower.backends.tvm_kernels._relax_aten import convert_operator
from bitlower.backends.tvm_kernels._relax_attention import convert_attention
from bitlower.backends.tvm_kernels._relax_frame import Frame
from bitlower.backends.tvm_kernels._relax_linear import convert_linear
from bitlower.backends.tvm_kernels._relax_operands import Call
from bitlower.backends.tvm_kernels._relax_pipeline import pipeline
from bitlower.backends.tvm_kernels._relax_rows import (
    convert_embedding,
    convert_norm,
    convert_pointwise,
    convert_rotary,
)
from bitlower.backends.tvm_kernels._spec import Target
from bitlower.ir import BitlowerError, Level, Program, ValueSpec, kernels

_KERNELS: dict[Any, Callable[[Call], list[Any]]] = {
    kernels.fused_linear: convert_linear,
    kernels.fused_norm: convert_norm,
    kernels.fused_pointwise: convert_pointwise,
    kernels.fused_rotary: convert_rotary,
    kernels.fused_attention: convert_attention,
    kernels.fused_embedding: convert_embedding,
}


@dataclass(frozen=True)
class Library:
    """A compiled Program.

    Args:
        executable: what TVM compiled, or a library that was loaded.
        program: whose inputs and outputs it has.
    """

    executable: Any
    program: Program

    def __post_init__(self) -> None:
        object.__setattr__(self, "_machine", relax.VirtualMachine(self.executable, tvm.cpu()))

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        given = [tvm.runtime.tensor(np.ascontiguousarray(t.numpy())) for t in self.program.arguments(inputs)]
        found = self._machine["main"](*given)  # type: ignore[attr-defined]
        return {
            spec.name: torch.from_numpy(value.numpy()) for spec, value in zip(self.program.outputs, found, strict=True)
        }


def build_module(program: Program, target: Target | None = None) -> Any:
    """The Relax module of a fused Program: one function ``main``, and its kernels.

    Args:
        program: at level fused, with one graph.
        target: of the kernels, a CPU; None: the best that this processor has.

    Raises:
        BitlowerError: the program is at another level, or has an operator without a converter.
    """
    if program.level is not Level.FUSED:
        raise BitlowerError(
            f"libraries are made of fused programs; this is {program.level}", hint="run the pass `fuse`"
        )
    if set(program.graphs) != {"model"}:
        raise BitlowerError(f"libraries are made of one graph, the program has {', '.join(program.graphs)}")
    builder = relax.BlockBuilder()
    frame = Frame(program.module, builder, target or host_target())
    variables = [relax.Var(_name(spec), frame.type_of(spec.type)) for spec in program.inputs]
    with builder.function("main", variables):
        with builder.dataflow():
            results = _convert(frame, program.graph, variables)
            output = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(output)
    return builder.finalize()


def _name(spec: ValueSpec) -> str:
    return spec.name.replace(".", "_")


def _convert(frame: Frame, graph: fx.Graph, variables: list[Any]) -> list[Any]:
    """The outputs of the graph."""
    given = iter(variables)
    for node in graph.nodes:
        if node.op == "placeholder":
            frame.values[node] = next(given)
        elif node.op == "call_function":
            convert = _KERNELS.get(node.target)
            frame.values[node] = convert(Call(frame, node)) if convert else convert_operator(frame, node)
    return list(frame.value(graph.output_node().args[0]))


def compile_program(program: Program, target: Target | None = None) -> Library:
    """The Program as a library in memory.

    Raises:
        BitlowerError: see :func:`build_module`.
    """
    target = target or host_target()
    executable = tvm.compile(build_module(program, target), target=tvm_target(target), relax_pipeline=pipeline())
    return Library(executable, program)
