"""Take quantize and dequantize into the kernels around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bitlower.ir import Level, Program
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.lowering._fuse_report import FuseReport, Launches, joined, report
from bitlower.passes.lowering._fusion import apply_fusions
from bitlower.passes.lowering._fusion_groups import regroup
from bitlower.passes.lowering._fusions import FUSIONS


@dataclass(frozen=True)
class Fuse(Pass):
    """Rewrite operators and the quantize and dequantize around them into kernels that read and give codes.

    Kernels compute what the operators computed, in the same order: the numbers stay bit for bit where the program runs
    on the same machine. Linears that read one value and agree are merged into one (Yao et al. 2022, ZeroQuant).
    """

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.INTEGER})
    ensures: ClassVar[Level | None] = Level.FUSED
    contract: ClassVar[Contract] = Contract.EXACT
    keeps_sizes: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> bool:
        """Fuse every graph and leave a :class:`FuseReport`."""
        context.put(joined([fuse(module) for module in program.graphs.values()]))
        return True


def fuse(module: fx.GraphModule) -> FuseReport:
    """Fuse one graph."""
    before = Launches(module)
    stands_for, sliced = regroup(module)
    before.place |= {new: before.place[old] for new, old in stands_for.items() if old in before.place}
    fused_kernels, misses = apply_fusions(FUSIONS, module)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return report(module, before, fused_kernels, [*sliced, *misses])
