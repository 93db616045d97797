"""The graph as translations want it: each operator has one, and operands have the dtype that torch promotes them to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from bitlower.ir import Program, TensorType, get_tensor, set_tensor
from bitlower.ir.operators import argument

aten = torch.ops.aten
_SIZES = (34, 38, 46, 58, 62, 74, 82)
"""Sizes that dimensions of an operator are traced with: even and different, not 0 nor 1, which torch would bake in."""
_UNPROMOTED = ("condition", "mask")
_PROMOTED = {aten.cat.default, aten.stack.default}
_SAME = {
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.expand.default, aten.contiguous.default,
    aten.clone.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
    aten.type_as.default, aten.alias.default, aten.detach.default, aten._unsafe_view.default, aten.reshape_as.default,
    aten.view_as.default, aten.expand_as.default,
}  # fmt: skip
"""Operators that give their operand as it is where they give it its type: dimensions of one name have one size."""
_NEUTRAL: Mapping[Any, int] = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_UNTAGGED = {
    "multiply", "subtract", "divide", "floor_divide", "greater", "greater_equal", "less", "less_equal", "not_equal",
    "masked_fill", "where", "__and__", "__or__", "__xor__",
}  # fmt: skip
"""Elementwise operators that torch does not tag as such."""
_REDUCTIONS = {aten.sum.default, aten.sum.dim_IntList, aten.cumsum.default, aten.prod.default, aten.prod.dim_int}


def prepared(program: Program, known: Callable[[fx.Node], bool]) -> Program:
    """A copy of ``program``, tensors shared, where every node is ``known`` as far as torch can decompose it."""
    copy = program.clone()
    for node in list(copy.graph.nodes):
        if node.op == "call_function" and not known(node):
            decompose(copy, node)
    for node in list(copy.graph.nodes):
        if node.op == "call_function":
            promote(node)
    for node in list(copy.graph.nodes):
        if _changes_nothing(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            copy.graph.erase_node(node)
    return copy


def _changes_nothing(node: fx.Node) -> bool:
    """Whether ``node`` returns its first operand as it is: a slice of all, a sum with 0, a cast to the same dtype."""
    source = next(iter(node.args), None)
    if node.op != "call_function" or not isinstance(source, fx.Node) or not node.meta.get("type"):
        return False
    if source.meta.get("type") != node.meta["type"]:
        return False
    neutral = _NEUTRAL.get(node.target)
    if neutral is not None:
        return bool(argument(node, "other") == neutral) and not node.kwargs
    return node.target in _SAME and (node.target is not aten.slice.Tensor or argument(node, "step") == 1)


def promote(node: fx.Node) -> None:
    """Cast operands of ``node`` as torch does it silently, by ``aten._to_copy`` in front of it."""
    dtype = _promoted_dtype(node)
    if dtype is None:
        return
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]

    def cast(operand: fx.Node) -> fx.Node:
        if _dtype(operand) == dtype:
            return operand
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
        shape = operand.meta["type"].shape if "type" in operand.meta else ()
        made.meta["type"] = TensorType(dtype, shape)
        return made

    node.args = tuple(
        operand if name in _UNPROMOTED else map_arg(operand, cast)
        for name, operand in zip(names, node.args, strict=False)
    )


def _promoted_dtype(node: fx.Node) -> torch.dtype | None:
    """What all operands of ``node`` are computed in; None for operators that promote nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or "type" not in node.meta:
        return None
    result: torch.dtype = node.meta["type"].dtype
    if target in _PROMOTED or target in _REDUCTIONS:
        return result
    if torch.Tag.pointwise not in target.tags and target._opname not in _UNTAGGED:
        return None
    if not result.is_complex and any(_dtype(operand).is_complex for operand in node.all_input_nodes):
        return None  # a length or an angle
    if result is not torch.bool:
        return result
    if target._opname.startswith("logical_"):
        return torch.bool
    operands = [_stand_in(operand) for operand in islice(node.args, 2)]
    return torch.result_type(*operands) if len(operands) == 2 else None  # a comparison


def _stand_in(operand: Any) -> Any:
    """Something of the operand's dtype and rank, which is what promotion goes by."""
    if not isinstance(operand, fx.Node):
        return operand
    type_ = operand.meta.get("type")
    return torch.empty([1] * type_.rank, dtype=type_.dtype, device="meta") if type_ else 0


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["type"].dtype if "type" in node.meta else torch.int64


def decompose(program: Program, node: fx.Node) -> None:
    """Put in place of ``node`` what torch decomposes it into; leave it where torch cannot."""
    part = _decomposed(node)
    if part is None:
        return
    names = _dimension_names(node, part.graph)
    made: dict[fx.Node, Any] = dict(zip(part.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op == "get_attr":
                name, tensor = f"{node.name}_{inner.name}", get_tensor(part, str(inner.target))
                set_tensor(program.module, name, tensor)
                made[inner] = node.graph.get_attr(name)
                made[inner].meta = {"type": TensorType(tensor.dtype, tuple(tensor.shape))}
            elif inner.op == "call_function":
                made[inner] = node.graph.node_copy(inner, made.__getitem__)
                made[inner].meta = _meta(inner, names)
    results, _ = torch.utils._pytree.tree_flatten(part.graph.output_node().args)
    _replace(node, [made[result] for result in results])


def _replace(node: fx.Node, results: list[fx.Node]) -> None:
    if "type" in node.meta:
        results[0].meta = dict(node.meta)
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):  # ``getitem`` of an operator with several results
            user.replace_all_uses_with(results[argument(user, "index")])
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _decomposed(node: fx.Node) -> fx.GraphModule | None:
    """``node`` alone, traced with sizes that vary and decomposed into core ATen operators."""
    graph = fx.Graph()
    inputs = {operand: graph.placeholder(f"x{i}") for i, operand in enumerate(node.all_input_nodes)}
    graph.output(graph.node_copy(node, inputs.__getitem__))
    sizes = dict(zip(_dimensions(node), itertools.chain(_SIZES, itertools.count(86, 4)), strict=False))
    examples: list[Any] = []
    dynamic: list[Any] = []
    for operand in inputs:
        type_ = operand.meta.get("type")
        if type_ is None:
            examples.append(next(iter(sizes.values()), _SIZES[0]))
            dynamic.append(torch.export.Dim.DYNAMIC)
            continue
        examples.append(torch.ones([sizes.get(d, d) for d in type_.shape], dtype=type_.dtype))
        dynamic.append({i: torch.export.Dim.DYNAMIC for i, d in enumerate(type_.shape) if isinstance(d, str)})
    shapes = dict(zip([str(p.target) for p in inputs.values()], dynamic, strict=True))
    try:
        exported = torch.export.export(
            fx.GraphModule({}, graph), tuple(examples), dynamic_shapes=shapes, strict=False
        ).run_decompositions()
    except Exception:  # whatever torch raises where an operator does not go with other sizes
        return None
    part: fx.GraphModule = exported.module(check_guards=False)
    for inner in list(part.graph.nodes):
        if inner.op == "call_module":  # torch's guards on the sizes of the example
            part.graph.erase_node(inner)
    return part


def _dimensions(node: fx.Node) -> list[str]:
    types = [operand.meta["type"] for operand in node.all_input_nodes if "type" in operand.meta]
    return sorted({d for type_ in types for d in type_.shape if isinstance(d, str)})


def _dimension_names(node: fx.Node, part: fx.Graph) -> dict[str, str]:
    """Torch's symbols by the dimensions of ``node``'s operands."""
    names: dict[str, str] = {}
    for placeholder, operand in zip(part.find_nodes(op="placeholder"), node.all_input_nodes, strict=True):
        shape = operand.meta["type"].shape if "type" in operand.meta else ()
        names |= {str(s): d for s, d in zip(_shape(placeholder), shape, strict=False) if isinstance(d, str)}
    return names


def _meta(inner: fx.Node, names: Mapping[str, str]) -> dict[str, Any]:
    value = inner.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {}
    sizes = (re.sub(r"[a-z]\w*", lambda symbol: names.get(symbol[0], symbol[0]), str(size)) for size in value.shape)
    return {"type": TensorType(value.dtype, tuple(int(size) if size.isdigit() else size for size in sizes))}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
