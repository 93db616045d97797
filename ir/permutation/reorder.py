"""Put domains of a graph into another order: weights are rewritten, and gathers are left only at inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import torch
from torch import fx

from bitlower.ir.operators import argument, operand
from bitlower.ir.permutation.domains import Domains, Orders
from bitlower.ir.permutation.relations import storage_key
from bitlower.ir.storage import like, release
from bitlower.ir.tensors import get_tensor, set_tensor
from bitlower.ir.types import TensorType

aten = torch.ops.aten


def reorder(module: fx.GraphModule, domains: Domains, orders: Orders) -> int:
    """Apply a permutation to each domain of ``orders``; the graph computes the same function as before.

    Parameters are replaced, a tied one once; indices that point into a reordered axis follow it. What comes in and goes
    out keeps its order by a gather (``index_select`` by a stored index). Gathers that do nothing are removed.

    Args:
        module: edited in place.
        domains: all of the graph.
        orders: see :data:`~bitlower.ir.permutation.domains.Orders`.

    Returns:
        How many gathers by a stored index are in the graph now.
    """
    permutations = {domain: order for domain, order in orders.items() if not _is_identity(order)}
    assert not any(domain.frozen for domain in permutations), "a frozen domain keeps its order"
    _reorder_stored(module, domains, permutations)
    for node, axes in _by_node(place for domain in permutations for place in domain.inputs).items():
        _gather_input(module, node, [(axis, domains.spread(node, axis, permutations)) for axis in axes])
    for node, axes in _by_node(place for domain in permutations for place in domain.outputs).items():
        _gather_output(module, node, [(axis, domains.spread(node, axis, permutations).argsort()) for axis in axes])
    return _remaining_gathers(module)


def _reorder_stored(module: fx.GraphModule, domains: Domains, orders: Orders) -> None:
    """Replace what is stored along the reordered axes, and the indices that point into them."""
    done: dict[tuple[object, ...], torch.Tensor] = {}
    for name in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
        old = get_tensor(module, name)
        axes = [a for a in range(old.dim()) if any(domain in orders for domain in domains.at(name, a))]
        target = domains.lookup(old, orders)
        if not axes and target is None:
            continue
        key = storage_key(old)
        if key not in done:
            new = old.detach()
            for axis in axes:
                new = new.index_select(axis, domains.spread(name, axis, orders))
            done[key] = like(new if target is None else target.argsort()[new], old)
            release(old)
        is_parameter = isinstance(old, torch.nn.Parameter)
        set_tensor(module, name, torch.nn.Parameter(done[key], old.requires_grad) if is_parameter else done[key])


def _by_node(places: Iterable[tuple[fx.Node, int]]) -> dict[fx.Node, list[int]]:
    nodes: dict[fx.Node, list[int]] = {}
    for node, axis in dict.fromkeys(places):
        nodes.setdefault(node, []).append(axis)
    return nodes


def _gather_input(module: fx.GraphModule, node: fx.Node, indices: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Reorder what comes in, for all that computes with it."""
    readers = [user for user in node.users if user.op != "output"]
    last = next(reversed(module.graph.find_nodes(op="placeholder")))
    value = node
    with module.graph.inserting_before(last.next):
        for axis, index in indices:
            value = insert_gather(module, value, axis, index)
    for reader in readers:
        reader.replace_input_with(node, value)


def _gather_output(module: fx.GraphModule, node: fx.Node, indices: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Give ``node`` out in its old order; an input that is handed through has it anyway."""
    if node.op == "placeholder":
        return
    output = module.graph.output_node()
    value = node
    with module.graph.inserting_before(output):
        for axis, index in indices:
            value = insert_gather(module, value, axis, index)
    output.replace_input_with(node, value)


def insert_gather(module: fx.GraphModule, node: fx.Node, axis: int, index: torch.Tensor) -> fx.Node:
    """At the insertion point of the graph, ``node`` with its entries along ``axis`` taken by ``index``."""
    name = _unused_name(module, f"orders.{node.name}_{axis}")
    set_tensor(module, name, index.clone())
    stored = module.graph.get_attr(name)
    stored.meta = {"type": TensorType(index.dtype, (index.numel(),))}
    gather = module.graph.call_function(aten.index_select.default, (node, axis, stored))
    gather.meta = {key: node.meta[key] for key in ("type", "path") if key in node.meta}
    return gather


def gathers(graph: fx.Graph) -> list[fx.Node]:
    """The gathers by a stored index."""
    selections = graph.find_nodes(op="call_function", target=aten.index_select.default)
    return [node for node in selections if operand(node, "index").op == "get_attr"]


def _remaining_gathers(module: fx.GraphModule) -> int:
    """Make one of two gathers in a row, remove those that do nothing, and count the others."""
    for node in gathers(module.graph):
        source, axis = operand(node, "self"), argument(node, "dim")
        index = get_tensor(module, str(operand(node, "index").target))
        if source in gathers(module.graph) and argument(source, "dim") == axis:
            with module.graph.inserting_before(node):
                first = get_tensor(module, str(operand(source, "index").target))
                both = insert_gather(module, operand(source, "self"), axis, index := first[index])
            node.replace_all_uses_with(both)
            module.graph.erase_node(node)
            node, source = both, operand(both, "self")
        if _is_identity(index) and node.meta["type"] == source.meta["type"]:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return len(gathers(module.graph))


def _unused_name(module: fx.GraphModule, name: str) -> str:
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return next(free for i in count() if (free := f"{name}_{i}" if i else name) not in names)


def _is_identity(order: torch.Tensor) -> bool:
    return torch.equal(order, torch.arange(order.numel()))
