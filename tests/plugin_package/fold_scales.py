"""Fold constant scales into the linear that follows."""

from dataclasses import dataclass

import torch

from bitlower.ir import Program, get_tensor, set_tensor
from bitlower.ir.operators import LinearNode, argument
from bitlower.passes import Contract, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScales(Pass):
    """Fold a ``mul`` by a number into the weight of the ``linear`` after it."""

    name = "fold-scales"
    contract = Contract.EXACT
    max_ratio: float = 8.0  # the largest scale worth folding

    def run(self, program: Program) -> bool:
        """Rewrite ``linear(x * s, w)`` to ``linear(x, w * s)``."""
        linears = [n for n in program.graph.nodes if n.target is aten.linear.default]
        found = [linear for linear in map(LinearNode, linears) if self._is_small(linear.x)]
        for linear in found:
            product, weight = linear.x, linear.weight
            scaled = get_tensor(program.module, weight.target).detach() * argument(product, "other")
            set_tensor(program.module, weight.target, torch.nn.Parameter(scaled))
            linear.set("x", argument(product, "self"))
        return bool(found)

    def _is_small(self, product: torch.fx.Node) -> bool:
        scale = argument(product, "other") if product.target is aten.mul.Tensor else None
        return isinstance(scale, float) and abs(scale) <= self.max_ratio
