"""What ``analyze-sensitivity`` leaves: plain data, the table that people read, and a recipe fragment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitlower.ir.charts import BarChart, Chart, MapChart
from bitlower.passes._machinery.report import Report, Table
from bitlower.passes.precision._measures import Kind, decibels
from bitlower.passes.precision._quantizer_groups import By


@dataclass(frozen=True)
class GroupSensitivity:
    """One group of quantizers (Bondarenko et al. §3, leave-one-out).

    Args:
        by: what they have in common.
        role: empty if they are grouped by layer alone.
        layer: empty if they are grouped by role alone.
        quantizers: how many they are.
        leave_one_out: the loss with all quantizers on but these.
        one_in: the loss with these on alone.
        gain: by how much leaving them out lowers the loss.
    """

    by: By
    role: str
    layer: str
    quantizers: int
    leave_one_out: float
    one_in: float
    gain: float

    @property
    def name(self) -> str:
        """Role and layer in words."""
        return f"{self.role} of {self.layer}" if self.role and self.layer else self.role or self.layer


@dataclass(frozen=True)
class SensitivityReport(Report):
    """Which quantizers cost most.

    Args:
        measure: ``kl`` (nats), ``sqnr`` (noise over signal), or ``disagreement`` (share).
        outputs: that were measured.
        batches: that were run.
        trials: that were run, equal ones counted once.
        quantizers: of the whole program.
        full: the loss with all of them on.
        groups: the largest gain first.
        raised: roles that the recipe raises.
        excluded: layers that it leaves float.
        lifted: quantizers that these are.
        remaining: the loss without these.
        recipe: the passes that led here, with these raised and excluded, as YAML; empty where there is nothing to
            gain, or where the passes are not known.
    """

    measure: Kind
    outputs: tuple[str, ...]
    batches: int
    trials: int
    quantizers: int
    full: float
    groups: tuple[GroupSensitivity, ...]
    raised: tuple[str, ...]
    excluded: tuple[str, ...]
    lifted: int
    remaining: float
    recipe: str

    def table(self) -> Table:
        """One row a group, the largest gain first."""
        headers = ("group", "quantizers", "all but these", "gain", "these alone")
        return headers, [
            (
                group.name,
                str(group.quantizers),
                self.show(group.leave_one_out),
                f"{group.gain:.3g}" if math.isfinite(group.gain) else "",
                self.show(group.one_in),
            )
            for group in self.groups
        ]

    def show(self, loss: float) -> str:
        """A loss with its unit; noise over signal in dB."""
        if self.measure == "sqnr":
            return f"{decibels(loss):.2f} dB"
        return f"{loss:.3g} nats" if self.measure == "kl" else f"{loss:.2%}"

    def summary(self) -> str:
        """The loss, and what of it can go."""
        text = f"{self.show(self.full)} with all {self.quantizers} quantizers"
        if not (self.raised or self.excluded):
            return f"{text}; there is nothing to raise or exclude"
        return f"{text}, {self.show(self.remaining)} with {self.lifted} of them in more bits or float"

    def details(self) -> Iterable[str]:
        """What to raise and exclude, and the recipe that does."""
        yield from (f"raise {role}" for role in self.raised)
        yield from (f"exclude {layer}" for layer in self.excluded)
        yield from self.recipe.splitlines()

    def charts(self) -> Iterable[Chart]:
        """Two views of the same groups: what leaving them out gains, and these alone."""
        whole = [group for group in self.groups if not (group.role and group.layer)]
        cells = {(group.layer, group.role): group for group in self.groups if group.role and group.layer}
        for title, key in (("Gain of leaving these out", "gain"), ("Loss with these alone", "one_in")):
            if whole:
                names = tuple(group.name for group in whole)
                bars = {title: tuple(getattr(group, key) for group in whole)}
                yield BarChart(f"{title}, by role or layer", f"loss ({self.measure})", names, bars, "sensitivity")
            if cells:
                layers, roles = (tuple(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
                numbers = tuple(
                    tuple(getattr(cells[layer, role], key) if (layer, role) in cells else None for role in roles)
                    for layer in layers
                )
                yield MapChart(f"{title} ({self.measure})", layers, roles, numbers, "sensitivity", "layer")


def recipe_text(steps: list[str | dict[str, Any]]) -> str:
    """The steps of a pipeline as the ``passes`` of a recipe."""
    lines = ["passes:"]
    for step in steps:
        if isinstance(step, str):
            lines.append(f"  - {step}")
        else:
            first, *rest = _block(step)
            lines += [f"  - {first}", *(f"    {line}" for line in rest)]
    return "\n".join(lines) + "\n"


def _block(form: Mapping[str, Any]) -> list[str]:
    """A mapping as YAML: mappings that hold mappings as indented blocks, all else in flow style (which is JSON)."""
    lines = []
    for key, value in form.items():
        if isinstance(value, Mapping) and any(isinstance(v, Mapping | list) for v in value.values()):
            lines += [f"{key}:", *(f"  {line}" for line in _block(value))]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines
