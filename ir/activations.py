"""Activation functions: one row each, which dataflow, canonicalization, fusion, kernels and backends read.

To add one, add a row. With a name it is also fused into kernels: give it an expression in
``backends/tvm_kernels/tir/expressions.py`` (see docs/operators.md). A test walks the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation function, elementwise.

    Args:
        target: the ATen operator.
        name: what kernels call it; empty: no kernel applies it.
        options: the keyword arguments that tell it from others of the same operator.
        function: what it computes, on a tensor of any shape and floating dtype; None without a name.
        folded: whether models write it out in elementary operators, which `clean` then replaces by it.
    """

    target: Any
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    folded: bool = False


ACTIVATIONS = (
    Activation(aten.relu.default, "relu", {}, functional.relu),
    Activation(aten.gelu.default, "gelu", {}, functional.gelu, folded=True),
    Activation(
        aten.gelu.default, "gelu-tanh", {"approximate": "tanh"}, lambda x: functional.gelu(x, approximate="tanh"), True
    ),
    Activation(aten.silu.default, "silu", {}, functional.silu, folded=True),
    Activation(aten.tanh.default, "tanh", {}, torch.tanh),
    Activation(aten.sigmoid.default, "sigmoid", {}, torch.sigmoid),
    Activation(aten.leaky_relu.default),
    Activation(aten.hardswish.default),
    Activation(aten.elu.default),
    Activation(aten.mish.default),
)
IN_KERNELS = {row.name: row.function for row in ACTIVATIONS if row.name and row.function}
"""What kernels may apply to a result, by name."""


def activation_of(node: fx.Node | None) -> Activation | None:
    """The row of the table that ``node`` is; None for another operator, or for one with arguments of its own."""
    if node is None or len(node.args) != 1:
        return None
    options = {key: value for key, value in node.kwargs.items() if value != "none"}  # gelu's own default
    rows = [row for row in ACTIVATIONS if row.target is node.target and dict(row.options) == options]
    return rows[0] if rows else None
