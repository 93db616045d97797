"""Choose the bits of each quantizer: a published set, or the best assignment under a budget, solved exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval, MinLen
from torch import fx

from bitlower.ir import BitlowerError, Level, Program
from bitlower.ir.charts import Topic
from bitlower.ir.feed_forward import feed_forwards
from bitlower.ir.quantizer_node import is_uncalibrated
from bitlower.ir.weight_ranges import WeightRanges
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.precision._items import Item, is_weight, set_width
from bitlower.passes.precision._report import PrecisionReport, PrecisionRow
from bitlower.passes.precision._roofline import Roofline
from bitlower.passes.precision._search import Budgets, SearchOptions, search
from bitlower.passes.precision._trials import TRIALS
from bitlower.passes.quantizers.calibrate import Calibrate, Estimator
from bitlower.passes.quantizers.quantize import PlacementReport

__all__ = ["AssignPrecision", "PrecisionReport", "paper_set"]

_WIDE = 16
"""Bits of the published set (Bondarenko et al. 2021, §4)."""


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Give uncalibrated quantizers other bits, before they are calibrated; leaves a :class:`PrecisionReport`.

    ``set: paper`` gives 16 bits to the input, the output and the residual sum of every feed-forward network
    (Bondarenko et al. §4, mixed-precision PTQ). Otherwise the loss of each quantizer at each number of bits is
    measured, all others off, on ranges as `calibrate` sets them at these bits; the assignment with the least sum of
    losses within the budgets is found as a multiple-choice knapsack, with a proof; and it is then refined by losses
    measured around it. Weights of linears that read the same activation get the same bits, and so do their outputs.
    """

    name: ClassVar[str] = "assign-precision"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    draws: ClassVar[frozenset[Topic]] = frozenset({"front"})
    set: Literal["none", "paper"] = "none"
    """A fixed set, which needs no data and no budget."""
    bits: Annotated[tuple[Annotated[int, Interval(ge=2, le=16)], ...], MinLen(1)] = (2, 3, 4, 6, 8, 16)
    """What to choose from."""
    weight_bits: Annotated[float, Ge(0)] | None = None
    """Budget: average bits of all quantized weights."""
    model_bytes: Annotated[int, Ge(0)] | None = None
    """Budget: bytes of all parameters, codes packed densely, scales and what stays float in float32."""
    activation_bits: Annotated[float, Ge(0)] | None = None
    """Budget: average bits of the activation quantizers."""
    share_16: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Budget: the share of activation quantizers with 16 bits; without `activation-bits` the rest stay as they are."""
    time: Annotated[float, Ge(0)] | None = None
    """Budget: the linears' time on ``target``, estimated by calculation, as a share of what the scheme takes there."""
    target: Roofline | None = None
    """What ``time`` is calculated for: ``a100``, ``h100``, or a mapping of the few numbers that make a roofline."""
    rows: Annotated[int, Ge(1)] = 128
    """How many rows (tokens of all texts) a linear reads at a time, for ``time``."""
    loss: Literal["auto", "kl", "sqnr"] = "auto"
    """KL divergence of the softmax, or noise over signal of the outputs; the former if auto and there are logits."""
    outputs: tuple[str, ...] = ()
    """The outputs to measure; all but a decoder's keys and values, or the logits, if empty."""
    batches: Annotated[int, Ge(1)] | None = None
    """How many calibration batches to measure losses on; all if left out."""
    weights: WeightRanges = "mse-golden"
    """How weights get their ranges in the trials; give `calibrate` the same."""
    activations: Estimator = "mse-token"
    """How activations get theirs."""
    rounds: Annotated[int, Ge(0)] = 1
    """How often the assignment is refined; a refinement that does not lower the measured loss is not kept."""
    front: Annotated[int, Ge(0)] = 9
    """How many values of the first budget to solve for, from the smallest to the largest that makes a difference."""
    measured: Annotated[int, Ge(0)] = 0
    """At how many of these to measure the loss too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.set == "paper":
            self._budgets().require_none("set: paper")
        else:
            self._budgets().require_one()
        if (self.time is None) != (self.target is None):
            raise BitlowerError(
                "assign-precision takes time and target together", hint="time: 0.8, target: a100, rows: 128"
            )

    def sets_bits(self) -> bool:
        """Always."""
        return True

    def unforeseen(self, program: Program) -> Iterable[str]:
        """The trials, unless the set is fixed."""
        if self.set == "none":
            yield TRIALS

    def needs_calibration(self) -> bool:
        """Unless the set is fixed."""
        return self.set == "none"

    def run(self, program: Program, context: Context) -> bool:
        """Choose, set the bits, and leave the report.

        Raises:
            BitlowerError: a quantizer is calibrated already, there is no calibration data, or there is nothing to
                choose.
        """
        _require_uncalibrated(program)
        budgets = self._budgets()
        if self.set == "paper":
            items = [Item((node,), (_WIDE,)) for node in paper_set(program)]
            choice, report = [0] * len(items), PrecisionReport(_rows(items))
        else:
            calibrate = Calibrate(weights=self.weights, activations=self.activations)
            items, choice, report = search(program, budgets, self._options(), calibrate, context)
        changed = _apply(items, choice)
        _update_placement(context, changed)
        context.put(report)
        return bool(changed)

    def _options(self) -> SearchOptions:
        return SearchOptions(**{field.name: getattr(self, field.name) for field in fields(SearchOptions)})

    def _budgets(self) -> Budgets:
        return Budgets(self.weight_bits, self.model_bytes, self.activation_bits, self.share_16, self.time)


def _require_uncalibrated(program: Program) -> None:
    for node, quantizer in program.quantizers():
        if not (quantizer.spec.granularity.dynamic or is_uncalibrated(node)):
            raise BitlowerError(
                f"the quantizer of {quantizer.tensor} has a range already",
                hint="assign-precision stands before `calibrate`, `gptq` and `rtn`",
            )


def paper_set(program: Program) -> list[fx.Node]:
    """The quantizers of input x, output h and residual sum y of each feed-forward network, in graph order.

    Raises:
        BitlowerError: there are none.
    """
    values = {
        value for part in feed_forwards(program.graph) if part.input for value in (part.input, part.output, part.sum)
    }
    nodes = [n for n, _ in program.quantizers() if not is_weight(n) and n.all_input_nodes[0] in values]
    if not nodes:
        raise BitlowerError(
            "no quantizer stands at the input, output or residual sum of a feed-forward network",
            hint="take a scheme of the full placement, such as W8A8-full",
        )
    return nodes


def _rows(items: list[Item]) -> tuple[PrecisionRow, ...]:
    return tuple(PrecisionRow(item.tensors, item.role, item.before, item.widths[0], None) for item in items)


def _apply(items: list[Item], choice: list[int]) -> dict[tuple[str, str], str]:
    """Set the bits; returns the new specs by role and tensor of those that changed."""
    changed = {}
    for item, chosen in zip(items, choice, strict=True):
        for node in item.nodes:
            if node.meta["quantizer"].spec.grid.bits != item.widths[chosen]:
                set_width(node, item.widths[chosen])
                quantizer = node.meta["quantizer"]
                changed[quantizer.role, quantizer.tensor] = str(quantizer.spec)
    return changed


def _update_placement(context: Context, changed: dict[tuple[str, str], str]) -> None:
    """Let the report on placed quantizers say what they are now."""
    if PlacementReport in context.results:
        rows = context[PlacementReport].rows
        context.put(PlacementReport(tuple(replace(r, spec=changed.get((r.role, r.tensor), r.spec)) for r in rows)))
