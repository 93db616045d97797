"""Measure which quantizers cost most: all but a group of them, and that group alone; and say what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Interval, MinLen
from torch import fx

from bitlower.ir import BitlowerError, Grid, Level, Program, QuantSpec, Scheme
from bitlower.ir.charts import Topic
from bitlower.ir.plugins.parameters import plain_parameters
from bitlower.ir.quantization.scheme import WEIGHT_ROLES
from bitlower.ir.quantizer_node import require_calibrated
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.pipeline import parse_pipeline
from bitlower.passes.precision._measures import Choice, Measure
from bitlower.passes.precision._quantizer_groups import OUTSIDE, By, QuantizerGroup, exclusion, group_quantizers
from bitlower.passes.precision._sensitivity_report import GroupSensitivity, SensitivityReport, recipe_text
from bitlower.passes.precision._trials import TRIALS, Switch, Trials
from bitlower.passes.quantizers.quantize import Quantize

__all__ = ["AnalyzeSensitivity", "SensitivityReport", "analyze"]

_WIDE, _WIDE_WEIGHT = 16, 8
"""Bits at which a quantizer counts as harmless: of activations (Bondarenko et al. 2021, §4), and of narrow weights."""


@dataclass(frozen=True)
class AnalyzeSensitivity(Pass):
    """Leave a :class:`SensitivityReport` on a calibrated program (Bondarenko et al. §3, leave-one-out).

    For each group of quantizers: the loss with all others on (leave-one-out) and with no others on (one-in), against
    the same program with all quantizers off. Then the roles and layers that give most for each quantizer are lifted
    together, one after the other and each time measured, until ``recover`` of the loss is gone, and a recipe is written
    that raises these roles and excludes these layers.
    """

    name: ClassVar[str] = "analyze-sensitivity"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.ANALYSIS
    draws: ClassVar[frozenset[Topic]] = frozenset({"sensitivity"})
    by: Annotated[tuple[By, ...], MinLen(1)] = ("role", "layer", "both")
    """How quantizers are grouped: by their role, by the layer of the model that they belong to, by both."""
    measure: Choice = "auto"
    """KL divergence of the softmax, noise over signal, or how often the top entry differs; auto goes by the outputs."""
    outputs: tuple[str, ...] = ()
    """The outputs to measure; all but a decoder's keys and values, or the logits, if empty."""
    batches: Annotated[int, Ge(1)] | None = None
    """How many calibration batches to run; all if left out."""
    recover: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """The share of the loss that the recipe has to take away."""
    limit: Annotated[float, Interval(ge=0, le=1)] = 0.25
    """The largest share of the quantizers that the recipe may lift."""

    def unforeseen(self, program: Program) -> Iterable[str]:
        """The trials."""
        yield TRIALS

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Analyze and leave the report.

        Raises:
            BitlowerError: there is no calibration data, or a quantizer has no range.
        """
        context.put(analyze(program, self, context))
        return False


def analyze(program: Program, options: AnalyzeSensitivity, context: Context) -> SensitivityReport:
    """Return the report on ``program``.

    Raises:
        BitlowerError: there is no calibration data, or a quantizer has no range.
    """
    groups = group_quantizers(program, options.by)
    require_calibrated(program)
    measure = Measure.choose(program, options.measure, options.outputs)
    trials = Trials(program, context.calibration[: options.batches], measure)
    left_out = [dict.fromkeys(group.nodes, Switch.OFF) for group in groups]
    full, *without = trials.run([{}, *left_out], track=context.track, label="all but one group")
    alone = [dict.fromkeys(group.nodes, Switch.ON) for group in groups]
    one_in = trials.run(alone, baseline=trials.off, track=context.track, label="one group alone")
    rows = [
        GroupSensitivity(group.by, group.role, group.layer, len(group.nodes), out, alone_, full - out)
        for group, out, alone_ in zip(groups, without, one_in, strict=True)
    ]
    chosen, remaining = _choose(program, trials, list(zip(groups, rows, strict=True)), full, options)
    raised = tuple(group.role for group in chosen if group.by == "role")
    excluded = tuple(group.layer for group in chosen if group.by == "layer")
    patterns = tuple(dict.fromkeys(p for g in chosen if g.by == "layer" for p in exclusion(program, g)))
    return SensitivityReport(
        measure.kind,
        measure.outputs,
        len(trials.batches),
        trials.runs,
        len(trials.quantizers),
        full,
        tuple(sorted(rows, key=lambda row: (-row.gain, row.name))),
        raised,
        excluded,
        len(_union(chosen)),
        remaining,
        _recipe(program, raised, patterns) if chosen else "",
    )


def _choose(
    program: Program,
    trials: Trials,
    measured: Sequence[tuple[QuantizerGroup, GroupSensitivity]],
    full: float,
    options: AnalyzeSensitivity,
) -> tuple[list[QuantizerGroup], float]:
    """Roles to raise and layers to exclude, and the loss without them.

    Candidates are lined up by what leaving them out gains a quantizer, and by what they cost alone a quantizer; of all
    beginnings of these two lines, the one that lifts fewest quantizers and takes away enough is taken, or the one that
    takes away most where none does.
    """
    candidates = [
        (group, row)
        for group, row in measured
        if group.by == "role" or (group.by == "layer" and group.layer not in OUTSIDE)
    ]
    candidates = [(g, r) for g, r in candidates if g.by == "role" or exclusion(program, g)]
    beginnings: list[list[QuantizerGroup]] = []
    for value in ("gain", "one_in"):
        line = sorted(candidates, key=lambda pair: (-getattr(pair[1], value) / pair[1].quantizers, pair[1].name))
        for count in range(1, len(line) + 1):
            beginning = [group for group, row in line[:count] if getattr(row, value) > 0]
            if len(_union(beginning)) <= options.limit * len(trials.quantizers):
                beginnings.append(beginning)
    if not beginnings or not full:
        return [], full
    losses = trials.run([dict.fromkeys(_union(b), Switch.OFF) for b in beginnings], label="several groups")
    enough = [(len(_union(b)), loss, b) for b, loss in zip(beginnings, losses, strict=True)]
    good = [entry for entry in enough if entry[1] <= (1 - options.recover) * full]
    _, loss, best = min(good, key=lambda e: e[:2]) if good else min(enough, key=lambda e: (e[1], e[0]))
    return (best, loss) if loss < full else ([], full)


def _union(groups: Sequence[QuantizerGroup]) -> set[fx.Node]:
    return {node for group in groups for node in group.nodes}


def _recipe(program: Program, raised: Sequence[str], excluded: Sequence[str]) -> str:
    """The passes that led to ``program`` with other schemes; empty where they are not known."""
    try:
        passes = [pass_ for text in program.passes for pass_ in parse_pipeline(text)]
    except BitlowerError:
        return ""
    if not any(isinstance(pass_, Quantize) for pass_ in passes):
        return ""
    steps: list[str | dict[str, Any]] = []
    for pass_ in passes:
        if isinstance(pass_, Quantize):
            scheme = raise_roles(pass_.scheme, raised)
            pass_ = replace(pass_, scheme=scheme, ignore=tuple(dict.fromkeys((*pass_.ignore, *excluded))))
        parameters = plain_parameters(pass_)
        steps.append({pass_.name: parameters} if parameters else pass_.name)
    return recipe_text([*steps, "lower-integer"])


def raise_roles(scheme: Scheme, roles: Sequence[str]) -> Scheme:
    """``scheme`` with 16 bits for the values of ``roles``; weights of fewer than 8 bits get 8."""
    overrides = dict(scheme.overrides)
    for role in roles:
        spec = scheme.spec(role)
        if spec is not None:
            overrides[role] = _wider(spec, role)
    return replace(scheme, overrides=tuple(overrides.items()))


def _wider(spec: QuantSpec, role: str) -> QuantSpec:
    narrow_weight = role in WEIGHT_ROLES and spec.grid.bits < _WIDE_WEIGHT
    grid: Grid = replace(spec.grid, bits=_WIDE_WEIGHT if narrow_weight else _WIDE)
    return replace(spec, grid=grid)
