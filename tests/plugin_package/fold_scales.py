"""Fold constant scales into the linear that follows."""

from dataclasses import dataclass

import torch

from bitlower.ir import Program, get_tensor, set_tensor
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
        found = [n for n in linears if n.args[0].target is aten.mul.Tensor and self._is_small(n.args[0].args[1])]
        for linear in found:
            product, weight = linear.args[:2]
            scaled = get_tensor(program.module, weight.target).detach() * product.args[1]
            set_tensor(program.module, weight.target, torch.nn.Parameter(scaled))
            linear.replace_input_with(product, product.args[0])
        return bool(found)

    def _is_small(self, scale: object) -> bool:
        return isinstance(scale, float) and abs(scale) <= self.max_ratio
