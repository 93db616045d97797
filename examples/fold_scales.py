"""A pass of your own; write ``- fold-scales`` into a recipe and run it with ``--plugin examples/fold_scales.py``."""

from dataclasses import dataclass

import torch

from bitlower.ir import Program, get_tensor, set_tensor
from bitlower.ir.operators import LinearNode, argument
from bitlower.passes import Contract, Pass


@dataclass(frozen=True)
class FoldScales(Pass):
    """Fold a multiplication by a number into the weight of the ``linear`` that reads it."""

    name = "fold-scales"
    contract = Contract.EXACT
    max_ratio: float = 8.0  # larger scales are left alone

    def run(self, program: Program) -> bool:
        """Rewrite ``linear(x * s, w)`` to ``linear(x, w * s)``."""
        changed = False
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            linear = LinearNode(node)
            product, weight = linear.x, linear.weight
            scale = argument(product, "other") if product.target is torch.ops.aten.mul.Tensor else None
            if isinstance(scale, float) and abs(scale) <= self.max_ratio and len(weight.users) == 1:
                folded = get_tensor(program.module, weight.target).detach() * scale
                set_tensor(program.module, weight.target, torch.nn.Parameter(folded))
                linear.set("x", argument(product, "self"))
                changed = True
        return changed
