"""Checks of kernel nodes: what they give, what they read, where they round; part of the verifier."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from bitlower.ir import kernels, ops
from bitlower.ir.activations import IN_KERNELS
from bitlower.ir.dataflow import VIEWS
from bitlower.ir.diagnostics import BitlowerError, nearest
from bitlower.ir.program import Program
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import get_tensor
from bitlower.ir.types import TensorType
from bitlower.ir.verifier.scales import check_layout, check_range, check_stored_codes, fail, identity, type_of


def check_kernel(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """A kernel's outputs, operands, roundings and shapes fit together."""
    if not kernels.is_kernel(node):
        if "quantizers" in node.meta:
            fail(node, "carries quantizers but is no kernel")
        return
    arguments = kernels.arguments(node)
    quantizers = node.meta.get("quantizers")
    if not isinstance(quantizers, dict) or not all(isinstance(q, Quantizer) for q in quantizers.values()):
        fail(node, "is a kernel and does not say what its codes and roundings are")
    _check_outputs(node, arguments)
    _check_options(node, arguments)
    roundings, operands = list(_roundings(node, arguments)), list(_operands(node, arguments))
    for rounding in roundings:
        _check_rounding(program, module, node, rounding)
    for operand in operands:
        _check_operand(program, module, node, operand)
    known = {rounding.name for rounding in roundings} | {operand.name for operand in operands}
    for name in quantizers:
        if name not in known:
            fail(node, f"has a quantizer for {name!r}, which it neither reads nor rounds")
    _check_shapes(module, node, arguments)
    _check_results(node)


def _check_outputs(node: fx.Node, arguments: dict[str, Any]) -> None:
    """They are ones that the kernel has, in its order, and there for what it is given."""
    names, known = str(arguments.get("outputs", "value")).split(), kernels.OUTPUTS[node.target]
    for name in names:
        if name not in known:
            fail(node, f"gives {name!r}", hint=nearest(name, known))
    if names != [name for name in known if name in names] or not names:
        fail(node, f"gives {names}, the order is {list(known)}")
    rounds, stored = bool(arguments.get("out_grid")), arguments.get("out_scale") is not None
    if not rounds and {"codes", "rounded"} & set(names):
        fail(node, "gives codes and has no grid for them")
    if {"scale", "zero_point"} & set(names) and (stored or not rounds):
        fail(node, "gives a scale that it does not choose")
    if rounds and not stored and "scale" not in known:
        fail(node, "has no scale for its codes, and this kernel chooses none")
    if "sum" in names and arguments.get("residual") is None:
        fail(node, "gives a sum and has no residual")


def _check_options(node: fx.Node, arguments: dict[str, Any]) -> None:
    """Words are of those that kernels know."""
    name = arguments.get("activation", "")
    if name and name not in IN_KERNELS:
        fail(node, f"has the unknown activation {name!r}", hint=nearest(name, IN_KERNELS))
    if arguments.get("norm", "layer") not in ("layer", "rms"):
        fail(node, f"is the unknown norm {arguments['norm']!r}", hint="known: layer, rms")
    if arguments.get("explicit") and arguments.get("causal"):
        fail(node, "is explicit and causal; explicit attention takes a mask")
    if not arguments.get("explicit") and (arguments.get("scores_grid") or arguments.get("probs_grid")):
        fail(node, "rounds inside an attention that is not explicit")


class _Rounding(NamedTuple):
    """A place where a kernel rounds: what it is told to do there."""

    name: str
    grid: str
    scale: Any
    zero_point: Any


class _Operand(NamedTuple):
    """What a kernel reads, with the scale and zero point that come with codes."""

    name: str
    value: Any
    scale: Any
    zero_point: Any


def _roundings(node: fx.Node, arguments: dict[str, Any]) -> Iterator[_Rounding]:
    for name in kernels.ROUNDINGS[node.target]:
        grid, scale, zero_point = (arguments.get(f"{name}_{part}") for part in ("grid", "scale", "zero_point"))
        yield _Rounding(name, grid or "", scale, zero_point)
    if node.target is kernels.fused_embedding:
        pairs = _columns(node, arguments, "rounded_scales", "rounded_zero_points")
        yield from (_Rounding(f"rounded_{i}", arguments.get("rounded_grid", ""), *pair) for i, pair in enumerate(pairs))


def _operands(node: fx.Node, arguments: dict[str, Any]) -> Iterator[_Operand]:
    for name in kernels.OPERANDS[node.target]:
        if arguments.get(name) is not None:
            yield _Operand(name, *(arguments.get(part) for part in (name, f"{name}_scale", f"{name}_zero_point")))
    if node.target is kernels.fused_embedding:
        rows = _columns(node, arguments, "tables", "table_scales", "table_zero_points", "ids")
        yield from (_Operand(f"table_{i}", *row[:3]) for i, row in enumerate(rows))


def _columns(node: fx.Node, arguments: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    """Lists of operands, side by side."""
    columns = [arguments[name] for name in names]
    if len({len(column) for column in columns}) > 1:
        fail(node, f"has {', '.join(f'{len(column)} {name}' for name, column in zip(names, columns, strict=True))}")
    return list(zip(*columns, strict=True))


def _check_rounding(program: Program, module: fx.GraphModule, node: fx.Node, rounding: _Rounding) -> None:
    """A rounding has a grid and what it stands for; its scale is stored in the granularity's shape, or chosen."""
    name, grid, scale, zero_point = rounding
    quantizer: Quantizer | None = node.meta["quantizers"].get(name)
    if bool(grid) != (quantizer is not None) or (scale is None) != (zero_point is None) or (scale and not grid):
        fail(node, f"its rounding {name!r} is not whole: it takes a grid, a quantizer, and a scale with a zero point")
    if quantizer is None:
        return
    if grid != str(quantizer.spec.grid):
        fail(node, f"rounds {name!r} to {grid}, the quantizer is {quantizer.spec}")
    if scale is None:
        if name != "out" or not quantizer.spec.granularity.dynamic:
            fail(node, f"has no scale for {name!r}, and {quantizer.spec.granularity} scales are stored tensors")
        return
    tensors = _stored(module, node, (scale, zero_point))
    check_layout(node, quantizer.spec.granularity, _result(node), *tensors)
    check_range(node, quantizer.spec.grid, *tensors)


def _stored(module: fx.GraphModule, node: fx.Node, parts: Sequence[Any]) -> list[torch.Tensor]:
    for part in parts:
        if not isinstance(part, fx.Node) or part.op != "get_attr":
            fail(node, f"its scale is {part}, not a stored tensor")
    return [get_tensor(module, str(part.target)) for part in parts]


def _result(node: fx.Node) -> TensorType:
    """The type of the result, all parts beside each other."""
    shape, merged_n = kernels.outputs(node)[0].type.shape, kernels.arguments(node).get("merged_n")
    return TensorType(torch.float32, (*shape[:-1], sum(merged_n)) if merged_n else shape)


def _check_operand(program: Program, module: fx.GraphModule, node: fx.Node, operand: _Operand) -> None:
    """Floats come alone; codes come with the scale and zero point that they were made with."""
    name, value, scale, zero_point = operand
    kind, quantizer = type_of(module, value), node.meta["quantizers"].get(name)
    if (scale is None) != (zero_point is None) or (scale is None) != kind.is_float or kind.is_float != (not quantizer):
        fail(node, f"its operand {name!r} is {kind}: codes take a quantizer, a scale and a zero point, floats none")
    if quantizer is None:
        return
    grid = quantizer.spec.grid
    if kind.dtype != grid.dtype:
        fail(node, f"its operand {name!r} is {kind}, the grid {grid} is held in {grid.dtype}")
    if value.op == "get_attr":
        tensors = _stored(module, node, (scale, zero_point))
        check_layout(node, quantizer.spec.granularity, kind, *tensors)
        check_range(node, grid, *tensors)
        check_stored_codes(module, node, value, grid)
    else:
        check_source(module, node, name, (value, scale, zero_point))


def check_source(module: fx.GraphModule, node: fx.Node, name: str, parts: tuple[fx.Node, Any, Any]) -> None:
    """``parts``, codes with scale and zero point that ``node`` reads, are those that a node before it returns."""
    source, *qparams = parts
    while source.target in VIEWS:
        if type_of(module, qparams[0]).rank:
            fail(node, f"reads {name!r} through %{source.name}, and its scales do not follow")
        source = source.all_input_nodes[0]
    origin = kernels.output_of(source)
    if origin is not None:
        kernel, output = origin
        if output.name != "codes":
            fail(node, f"its operand {name!r} is the {output.name} of %{kernel.name}, which holds no codes")
        made = _made_with(module, kernel, output.part)
    elif source.target is ops.quantize:
        made = list(source.args[1:3])
    else:
        fail(node, f"its operand {name!r} comes from %{source.name}, which holds no codes")
    if not all(_same(module, one, other) for one, other in zip(qparams, made, strict=True)):
        fail(node, f"reads {name!r} with another scale or zero point than %{source.name} was made with")


def _made_with(module: fx.GraphModule, kernel: fx.Node, part: int) -> list[Any]:
    """The scale and zero point of the codes of a part: nodes, or slices of stored tensors."""
    arguments = kernels.arguments(kernel)
    if arguments.get("out_scale") is None:
        outputs = kernels.read_outputs(kernel)
        return [outputs.get((part, name)) for name in ("scale", "zero_point")]
    pair, merged_n = [arguments["out_scale"], arguments["out_zero_point"]], arguments.get("merged_n")
    if not merged_n:
        return pair
    start = sum(merged_n[:part])
    stored = [get_tensor(module, str(node.target)) for node in pair]
    return [tensor[..., start : start + merged_n[part]] if tensor.dim() else tensor for tensor in stored]


def _same(module: fx.GraphModule, one: Any, other: Any) -> bool:
    """Whether a scale is another: the same node or stored tensor, or equal in all entries."""
    if isinstance(other, fx.Node) or not isinstance(one, fx.Node) or one.op != "get_attr" or other is None:
        return identity(one) == identity(other)
    return bool((get_tensor(module, str(one.target)) == other).all())


def _check_shapes(module: fx.GraphModule, node: fx.Node, arguments: dict[str, Any]) -> None:
    """The extents that a kernel reduces over and joins agree."""
    shape = {name: type_of(module, value).shape for name, value in arguments.items() if isinstance(value, fx.Node)}
    pairs: list[tuple[str, object, object]] = []
    if node.target is kernels.fused_linear:
        pairs += [("columns", shape["x"][-1], shape["weight"][1])]
        pairs += [("merged_n", sum(arguments["merged_n"]), shape["weight"][0])] if arguments.get("merged_n") else []
        pairs += [("slices", sum(arguments["columns"]), shape["weight"][1])] if arguments.get("columns") else []
        pairs += [("bias", shape["bias"], (shape["weight"][0],))] if "bias" in shape else []
        pairs += [("residual", shape["residual"], _result(node).shape)] if "residual" in shape else []
    elif node.target is kernels.fused_norm:
        pairs += [(name, shape[name], shape["x"][-1:]) for name in ("weight", "bias") if name in shape]
        pairs += [("residual", shape["residual"], shape["x"])] if "residual" in shape else []
    elif node.target is kernels.fused_pointwise:
        pairs += [(name, shape[name], shape["x"]) for name in ("factor", "residual") if name in shape]
    elif node.target is kernels.fused_attention:
        pairs += [("width", shape["query"][-1], shape["key"][-1]), ("keys", shape["key"][:3], shape["value"][:3])]
    for name, one, other in pairs:
        if one != other:
            fail(node, f"its {name} do not fit: {one} and {other}")


def _check_results(node: fx.Node) -> None:
    """Its results are taken out by ``getitem``, with the types that they have."""
    try:
        expected = kernels.outputs(node)
    except (BitlowerError, AssertionError) as error:
        fail(node, str(error))
    for user in node.users:
        index = user.args[1] if user.target is operator.getitem else None
        if not isinstance(index, int) or not 0 <= index < len(expected):
            fail(user, f"reads the kernel %{node.name}, of which only its {len(expected)} results can be taken")
        if user.meta.get("type") != expected[index].type:
            fail(user, f"is of type {user.meta.get('type')}, %{node.name} gives {expected[index].type}")
