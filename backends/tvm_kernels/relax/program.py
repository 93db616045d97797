"""A fused or float Program as a Relax module, compiled for a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx
from tvm import relax

from bitlower.backends.tvm_kernels.internals import variables_in_order
from bitlower.backends.tvm_kernels.relax.aten import convert_operator
from bitlower.backends.tvm_kernels.relax.attention import convert_attention
from bitlower.backends.tvm_kernels.relax.builder import Frame
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.relax.embedding import convert_embedding
from bitlower.backends.tvm_kernels.relax.linear import convert_linear
from bitlower.backends.tvm_kernels.relax.pipeline import fusion
from bitlower.backends.tvm_kernels.relax.precision import AUTO, activations_of, half_values
from bitlower.backends.tvm_kernels.relax.rotary import convert_rotary
from bitlower.backends.tvm_kernels.relax.rowwise import convert_norm, convert_pointwise
from bitlower.backends.tvm_kernels.schedules.gpu.fallback import schedule
from bitlower.backends.tvm_kernels.spec.base import HALF
from bitlower.backends.tvm_kernels.spec.functions import functions_of
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.target import host_target
from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec, kernels
from bitlower.ir.operators import graph_results

_KERNELS: dict[Any, Callable[[Call], list[Any]]] = {
    kernels.fused_linear: convert_linear,
    kernels.fused_norm: convert_norm,
    kernels.fused_pointwise: convert_pointwise,
    kernels.fused_attention: convert_attention,
}
_EXPRESSIONS: dict[Any, Callable[[Call], list[Any]]] = {
    kernels.fused_rotary: convert_rotary,
    kernels.fused_embedding: convert_embedding,
}
"""Operators that TVM fuses with their neighbours."""


def build_module(
    program: Program, target: Target | None = None, activations: str = AUTO, log: OperatorLog | None = None
) -> Any:
    """The Relax module of a Program: its functions, see :func:`functions_of`, and their kernels.

    Args:
        program: at level fused or float, with one graph.
        target: of the kernels; None: the best CPU that this processor is.
        activations: see :func:`~bitlower.backends.tvm_kernels.compile_program`.
        log: gets what becomes of the operators.

    Raises:
        BitlowerError: the program is at another level, or has an operator without a converter; the target has no
            kernels for the dtype.
    """
    if program.level not in (Level.FLOAT, Level.FUSED):
        raise BitlowerError(
            f"libraries are made of fused programs; this is {program.level}", hint="run the pass `fuse`"
        )
    if set(program.graphs) != {"model"}:
        raise BitlowerError(f"libraries are made of one graph, the program has {', '.join(program.graphs)}")
    builder, target = relax.BlockBuilder(), target or host_target()
    half, log = activations_of(target, activations) == HALF, OperatorLog() if log is None else log
    for name, part in functions_of(program).items():
        frame = Frame(part.module, builder, target, log, half_values(part) if half else None)
        variables = [relax.Var(_name(spec), frame.type_of(kind)) for spec, kind in _inputs(frame, part)]
        with builder.function(name, variables):
            with builder.dataflow():
                results = _convert(frame, part.graph, variables)
                output = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(output)
    return builder.finalize()


def _inputs(frame: Frame, program: Program) -> Iterator[tuple[ValueSpec, TensorType]]:
    """The inputs, and the types that they have here."""
    places = program.graph.find_nodes(op="placeholder")
    yield from zip(program.inputs, map(frame.kind_of, places), strict=True)


def _name(spec: ValueSpec) -> str:
    return spec.name.replace(".", "_")


def _convert(frame: Frame, graph: fx.Graph, variables: list[Any]) -> list[Any]:
    """The outputs of the graph."""
    remaining = iter(variables)
    for node in graph.nodes:
        if node.op == "placeholder":
            frame.values[node] = next(remaining)
        elif node.op == "call_function":
            convert = (_KERNELS | _EXPRESSIONS).get(node.target)
            frame.values[node] = convert(Call(frame, node)) if convert else convert_operator(frame, node)
            if node.target in _KERNELS:
                frame.log.convert(node)
    return list(frame.value(graph_results(graph)))


@variables_in_order()
def fuse_module(
    program: Program,
    target: Target,
    device: Any,
    sizes: Mapping[str, int] | None = None,
    activations: str = AUTO,
    log: OperatorLog | None = None,
) -> Any:
    """The Relax module of a Program, in which TVM has fused what is left, and every function has a schedule.

    Args:
        program: at level fused or float, with one graph.
        target: of the kernels.
        device: the TVM target.
        sizes: symbolic dimensions that are known already, by name.
        activations: see :func:`~bitlower.backends.tvm_kernels.compile_program`.
        log: gets what becomes of the operators.

    Raises:
        BitlowerError: see :func:`build_module`.
        CheckError: a function for a GPU has no schedule.
    """
    module = build_module(program, target, activations, log)
    if sizes:
        for name in functions_of(program):
            known = {size: sizes[size] for size in open_sizes(module[name]) if size in sizes}
            module = relax.transform.BindSymbolicVars(known, name)(module)
    with device:
        module = fusion()(module)
    return module if target.on_cpu else schedule(module, device)


def open_sizes(function: Any) -> list[str]:
    """The symbolic dimensions of what a function takes."""
    variables = {v.name: None for parameter in function.params for v in relax.analysis.tir_vars_in_type(parameter.ty)}
    return list(variables)
