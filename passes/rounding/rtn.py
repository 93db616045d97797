"""Round-to-nearest: lay grids over the weights and change nothing else; the baseline of every weight rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bitlower.ir import Level, Program
from bitlower.ir.weight_ranges import WeightRanges, calibrate_weights, uncalibrated_weights
from bitlower.passes._machinery.base import Context, Contract, Pass


@dataclass(frozen=True)
class Rtn(Pass):
    """Calibrate all uncalibrated weight quantizers with grids over the weights as they are; needs no data.

    Activation quantizers stay as they are: run `calibrate` after this pass for those.
    """

    name: ClassVar[str] = "rtn"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    keeps_sizes: ClassVar[bool] = True
    ranges: WeightRanges = "minmax"
    """How a grid is laid over the weights that share it: from end to end, or where the squared error is least."""

    def run(self, program: Program, context: Context) -> bool:
        """Close the quantizers.

        Raises:
            BitlowerError: a weight holds NaN or Inf.
        """
        nodes = uncalibrated_weights(program.module)
        calibrate_weights(program.module, context.track(nodes, "weight ranges"), self.ranges)
        return bool(nodes)
