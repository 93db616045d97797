"""What a kernel operator in a graph reads, rounds and gives: the one description that passes, checks and backends use.

A kernel node has its first operands as arguments and everything else as keyword arguments; ``meta["quantizers"]`` says
by operand (``x``, ``weight``, ``out`` …) what its codes and roundings stand for. Its results are taken out by
``getitem``, in the order of the layers that were merged into it and, for each, of ``outputs``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from bitlower.ir.kernels.attention import fused_attention
from bitlower.ir.kernels.references import fused_embedding, fused_linear, fused_norm, fused_pointwise
from bitlower.ir.kernels.rotary import fused_rotary
from bitlower.ir.quantization.grid import Grid
from bitlower.ir.types import Dim, TensorType

OPERANDS: dict[Any, tuple[str, ...]] = {
    fused_linear: ("x", "weight", "residual"),
    fused_norm: ("x", "residual", "weight"),
    fused_pointwise: ("x", "factor", "residual"),
    fused_rotary: ("x",),
    fused_attention: ("query", "key", "value"),
    fused_embedding: (),
}
"""The operands that may be codes; each has a ``<operand>_scale`` and a ``<operand>_zero_point``. Those of an embedding,
``tables``, are lists, and so are its inner roundings ``rounded``; their quantizers are ``table_0``, ``rounded_0`` …"""
ROUNDINGS: dict[Any, tuple[str, ...]] = {
    fused_linear: ("rounded", "out"),
    fused_norm: ("out",),
    fused_pointwise: ("out",),
    fused_rotary: ("out",),
    fused_attention: ("scores", "probs", "out"),
    fused_embedding: ("out",),
}
"""Where a kernel rounds: ``<rounding>_scale``, ``<rounding>_zero_point``, ``<rounding>_grid``."""
OUTPUTS: dict[Any, tuple[str, ...]] = {
    fused_linear: ("value", "codes", "rounded"),
    fused_norm: ("sum", "value", "codes", "scale", "zero_point", "rounded"),
    fused_pointwise: ("value", "codes", "scale", "zero_point", "rounded"),
    fused_rotary: ("value", "codes", "scale", "zero_point", "rounded"),
    fused_attention: ("value", "codes", "rounded"),
    fused_embedding: ("value", "codes", "scale", "zero_point", "rounded"),
}
"""What each kernel can give, in order."""
KERNELS = frozenset(OPERANDS)


class Output(NamedTuple):
    """One of the tensors that a kernel returns."""

    part: int
    """The layer, of those merged into it."""
    name: str
    """Of :data:`OUTPUTS`."""
    type: TensorType


def is_kernel(node: fx.Node) -> bool:
    """Whether ``node`` is a kernel."""
    return node.op == "call_function" and node.target in KERNELS


def kind(node: fx.Node) -> str:
    """The kernel's operator in a word, such as ``fused_linear``."""
    return str(node.target).removeprefix("bitlower.").removesuffix(".default")


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a kernel by name; those that are left out are not there."""
    return bind(node, node.args, node.kwargs)


def bind(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` and ``kwargs``, laid out as those of ``node``, by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def outputs(node: fx.Node) -> list[Output]:
    """What a kernel returns, in order."""
    node_arguments = arguments(node)
    names = str(node_arguments.get("outputs", "value")).split()
    codes = Grid.parse(node_arguments["out_grid"]).dtype if node_arguments.get("out_grid") else torch.float32
    results = []
    for part, shape in enumerate(_shapes(node, node_arguments)):
        for name in names:
            size = (*shape[:-1], 1) if name in ("scale", "zero_point") else shape
            results.append(Output(part, name, TensorType(codes if name == "codes" else torch.float32, size)))
    return results


def _shapes(node: fx.Node, node_arguments: dict[str, Any]) -> Iterator[tuple[Dim, ...]]:
    """The shape of the result of each part."""
    if node.target is fused_linear:
        sizes = node_arguments.get("merged_n") or (_shape(node_arguments["weight"])[0],)
        yield from ((*_shape(node_arguments["x"])[:-1], size) for size in sizes)
    elif node.target is fused_embedding:
        shapes = [_shape(ids) for ids in node_arguments["ids"]]
        yield (*_broadcast(shapes), _shape(node_arguments["tables"][0])[-1])
    elif node.target is fused_attention:
        shape = (*_shape(node_arguments["query"])[:-1], _shape(node_arguments["value"])[-1])
        yield _joined(shape) if node_arguments.get("heads") else shape
    else:
        shape = _shape(node_arguments["x"])
        yield _joined(shape) if node_arguments.get("heads") else shape


def _shape(node: fx.Node) -> tuple[Dim, ...]:
    kind: TensorType = node.meta["type"]
    return kind.shape


def _broadcast(shapes: list[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """The common shape; all have the same rank, and a dimension that is not 1 wins."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _joined(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """``[batch, heads, length, head_dim]`` as ``[batch, length, heads · head_dim]``."""
    batch, heads, length, head_dim = shape
    assert isinstance(heads, int), f"heads of the symbolic shape {shape}"
    assert isinstance(head_dim, int), f"heads of the symbolic shape {shape}"
    return (batch, length, heads * head_dim)


def output_of(node: fx.Node) -> tuple[fx.Node, Output] | None:
    """The kernel and the output that ``node`` takes out of it; None if it is nothing of the kind."""
    if node.target is not operator.getitem:
        return None
    kernel, index = node.args
    if not isinstance(kernel, fx.Node) or not is_kernel(kernel) or not isinstance(index, int):
        return None
    results = outputs(kernel)
    return (kernel, results[index]) if 0 <= index < len(results) else None


def read_outputs(kernel: fx.Node) -> dict[tuple[int, str], fx.Node]:
    """The ``getitem`` nodes of a kernel by part and name."""
    nodes = {}
    for user in kernel.users:
        origin = output_of(user)
        if origin:
            nodes[origin[1].part, origin[1].name] = user
    return nodes
