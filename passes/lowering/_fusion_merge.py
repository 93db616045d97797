"""Linears as the start of a fusion, several that read one value as one: query, key and value; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import fx

from bitlower.ir import Granularity, Quantizer, TensorType, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import ADD
from bitlower.ir.operators import LinearNode
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import sole_user
from bitlower.ir.storage import like
from bitlower.passes.lowering._fusion import Match, stored_codes
from bitlower.passes.lowering._fusion_groups import COLUMNS
from bitlower.passes.lowering._fusion_stages import ROWS, activation_name, gated, is_per_token

aten = torch.ops.aten


def start_linear(match: Match) -> str | None:
    """A linear over stored codes, merged with those after it that read the same value where they agree."""
    linear = match.root
    weight = stored_codes(LinearNode(linear).weight)
    if weight is None:
        return "its weight is not stored as codes of its own"
    group, reason = mergeable(linear)
    if reason:
        match.reasons.append(f"not merged with what reads the same value: {reason}")
    match.read("x", LinearNode(linear).x)
    if COLUMNS in linear.meta:
        match.arguments["columns"] = linear.meta[COLUMNS]
    if len(group) > 1:
        if any(is_per_token(member) for member in group):
            match.reasons.append(f"its results are quantized outside: {ROWS}")
        _merge(match, group)
        return ""
    match.read("weight", weight)
    match.arguments["bias"] = LinearNode(linear).bias
    return ""


def mergeable(linear: fx.Node) -> tuple[list[fx.Node], str]:
    """The linears that can be merged into one, ``linear`` being the first of them, or why not all others can."""
    readers = [user for user in LinearNode(linear).x.users if user.target is aten.linear.default]
    group, reasons = [linear], list[str]()
    for other in readers:
        if other is not linear:
            reason = _why_apart(linear, other, readers)
            if reason:
                reasons.append(reason)
            else:
                group.append(other)
    return sorted(group), "; ".join(sorted(set(reasons)))


def _why_apart(first: fx.Node, other: fx.Node, readers: Sequence[fx.Node]) -> str:
    """Why two linears that read one value are not merged; empty if they are."""
    weights = [stored_codes(LinearNode(linear).weight) for linear in (first, other)]
    if weights[0] is None or weights[1] is None:
        return "one has no codes of its own"
    if any(len(readers_of(weight)) > 1 for weight in weights if weight is not None):
        return "a weight is shared with another layer"
    if weights[0].meta["quantizer"].spec != weights[1].meta["quantizer"].spec:
        return "their weights have different grids"
    if (LinearNode(first).bias is None) != (LinearNode(other).bias is None):
        return "one has no bias"
    if any(_goes_on(linear, readers) for linear in (first, other)):
        return "what follows one of them goes into its own kernel"
    outputs = [_output(linear) for linear in (first, other)]
    specs = [quantize.meta["quantizer"].spec if quantize is not None else None for quantize in outputs]
    return "" if specs[0] == specs[1] else "their results have different grids"


def readers_of(weight: fx.Node) -> list[fx.Node]:
    """All nodes that read the codes behind ``weight``, under whatever name of the node."""
    target = QuantizerNode(weight).value.target
    graph = weight.graph
    nodes = [node for node in graph.find_nodes(op="get_attr") if node.target == target]
    return [reader for node in nodes for user in node.users for reader in (user.users or (user,))]


def _goes_on(linear: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether an activation or a sum follows that the linear's own kernel takes, or a rounding for each token."""
    user = sole_user(linear)
    if user is not None and activation_name(user):
        product = gated(user)
        return product is None or product[1] not in readers
    return user is not None and user.target in ADD


def _output(linear: fx.Node) -> fx.Node | None:
    """What quantizes the result of ``linear`` with a stored scale, if that is all that reads it."""
    user = sole_user(linear)
    return user if user is not None and user.target is ops.quantize and QuantizerNode(user).is_static else None


def _merge(match: Match, group: Sequence[fx.Node]) -> None:
    """Let the kernel have the weights of ``group`` one below the other, and return the result of each."""
    weights = [LinearNode(linear).weight for linear in group]
    views = [QuantizerNode(weight) for weight in weights]
    sizes = [view.value.meta["type"].shape[0] for view in views]
    stem = _stem([str(weight.meta["quantizer"].tensor) for weight in weights])
    quantizer: Quantizer = weights[0].meta["quantizer"]
    kind = quantizer.spec.granularity.kind
    granularity = quantizer.spec.granularity if kind == "group" else Granularity.per_channel(0)
    match.quantizers["weight"] = replace(
        quantizer, spec=replace(quantizer.spec, granularity=granularity), tensor=f"{stem}.weight"
    )
    codes = [view.weight(match.module) for view in views]
    rows = [[_by_row(part, size) for part in view.range(match.module)] for view, size in zip(views, sizes, strict=True)]
    flat = f"quantizers.{stem.replace('.', '_')}_weight"
    match.arguments |= {
        "weight": _store(match, f"{stem}.weight_codes", codes),
        "weight_scale": _store(match, f"{flat}.scale", [scale for scale, _ in rows]),
        "weight_zero_point": _store(match, f"{flat}.zero_point", [zero for _, zero in rows]),
        "merged_n": sizes,
    }
    if LinearNode(group[0]).bias is not None:
        biases = [get_tensor(match.module, str(LinearNode(linear).stored_bias)).detach() for linear in group]
        match.arguments["bias"] = _store(match, f"{stem}.bias", biases, parameter=True)
    match.results = [{"value": linear} for linear in group]
    match.fused_nodes += [node for pair in zip(group, weights, strict=True) for node in pair if node is not match.root]
    _merge_outputs(match, group, sizes, f"quantizers.{stem.replace('.', '_')}")


def _merge_outputs(match: Match, group: Sequence[fx.Node], sizes: Sequence[int], stem: str) -> None:
    """Let the kernel round each result to its own grid, if they have grids."""
    outputs = [_output(linear) for linear in group]
    quantizers = [quantize for quantize in outputs if quantize is not None]
    if len(quantizers) < len(group):
        return
    match.round("out", quantizers[0])
    spec = replace(match.quantizers["out"].spec, granularity=Granularity.per_embedding())
    match.quantizers["out"] = replace(
        match.quantizers["out"], spec=spec, tensor="_".join(linear.name for linear in group)
    )
    rank = group[0].meta["type"].rank
    ranges = [QuantizerNode(quantize).range(match.module) for quantize in quantizers]
    for name, parts in zip(("scale", "zero_point"), zip(*ranges, strict=True), strict=True):
        values = [_by_column(part, size, rank) for part, size in zip(parts, sizes, strict=True)]
        match.arguments[f"out_{name}"] = _store(match, f"{stem}.{name}", values, axis=-1)
    for part, linear, quantize in zip(match.results, group, quantizers, strict=True):
        part |= {"value": linear, "codes": quantize}
        match.fused_nodes.append(quantize)


def _by_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight's scale with one entry a row: ``[rows, groups]``, or ``[rows, 1]`` where a tensor shares one."""
    wide = scale.reshape(1, 1) if scale.dim() == 0 else scale
    return wide.repeat_interleave(rows // wide.shape[0], 0)


def _by_column(scale: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """A result's scale with one entry an index: ``[1, …, size]``."""
    wide = scale.reshape((1,) * rank) if scale.dim() == 0 else scale
    return wide.repeat_interleave(size // wide.shape[-1], -1)


def _store(
    match: Match, target: str, tensors: Sequence[torch.Tensor], *, axis: int = 0, parameter: bool = False
) -> fx.Node:
    """``tensors`` one behind the other as a tensor of the program, and the node that reads it."""
    whole = like(torch.cat(list(tensors), axis), tensors[0])
    set_tensor(match.module, target, torch.nn.Parameter(whole) if parameter else whole)
    with match.root.graph.inserting_before(match.at):
        node = match.root.graph.get_attr(target)
    node.meta["type"] = TensorType(whole.dtype, tuple(whole.shape))
    return node


def _stem(tensors: Sequence[str]) -> str:
    """A module path for merged weights: ``layer.query.weight``, ``layer.key.weight`` give ``layer.query_key``."""
    paths = [tensor.rpartition(".")[0].split(".") for tensor in tensors]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    return ".".join([*common, "_".join("_".join(path[len(common) :]) for path in paths)])
