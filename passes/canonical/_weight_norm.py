"""Weights that are stored as a direction and a length (Salimans and Kingma, 2016, eq. 2) are multiplied out once."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import TensorType, get_tensor, set_tensor
from bitlower.ir.operators import argument, operand
from bitlower.ir.rewrite import Rule
from bitlower.ir.storage import like

aten = torch.ops.aten
_PLACES = ((".parametrizations.weight.original1", ".weight"), (".weight_v", ".weight"))
"""How torch names the direction, and what the weight is called without the parametrization."""


def fold_weight_norm(module: fx.GraphModule, node: fx.Node) -> fx.Node | str:
    """Replace ``g · v / ‖v‖`` by a weight of that value, which has the name that it had without the parametrization."""
    direction, length = operand(node, "v"), operand(node, "g")
    if direction.op != "get_attr" or length.op != "get_attr":
        return "its direction or its length is no stored tensor"
    stored = str(direction.target)
    name = next((stored.removesuffix(end) + plain for end, plain in _PLACES if stored.endswith(end)), "")
    if not name:
        return f"its direction {stored} has a name of its own kind"
    with torch.no_grad():
        source = get_tensor(module, stored)
        value = torch._weight_norm(source, get_tensor(module, str(length.target)), int(argument(node, "dim")))
    set_tensor(module, name, torch.nn.Parameter(like(value, source), requires_grad=source.requires_grad))
    with node.graph.inserting_before(node):
        weight = node.graph.get_attr(name)
    weight.meta = {"type": TensorType(value.dtype, tuple(value.shape))}
    node.replace_all_uses_with(weight)
    return weight


RULES = (Rule("weight-norm", frozenset({aten._weight_norm.default}), fold_weight_norm),)
