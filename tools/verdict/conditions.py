"""Conditions on figures, for continuous integration: ``--fail-if "kl > 0.05"``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitlower.ir import BitlowerError, nearest

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Condition:
    """A figure that makes a command fail.

    Args:
        name: of the figure, dashes as underscores.
        operator: ``<``, ``<=``, ``>`` or ``>=``.
        limit: the number on its right.
    """

    name: str
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """A condition such as ``kl > 0.05``.

        Raises:
            BitlowerError: it is none.
        """
        match = _FORM.fullmatch(text)
        try:
            if match:
                return cls(match[1].replace("-", "_"), match[2], float(match[3]))
        except ValueError:
            pass
        raise BitlowerError(
            f"--fail-if {text!r} is no condition",
            hint='give a figure, one of < <= > >=, and a number: --fail-if "kl > 0.05"',
        )

    def holds(self, value: float) -> bool:
        """Whether ``value`` makes the command fail; one that is not a number always does."""
        return value != value or _OPERATORS[self.operator](value, self.limit)

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.limit:g}"


def parse_conditions(texts: Sequence[str] | None, known: Iterable[str] = ()) -> tuple[Condition, ...]:
    """Conditions of the command line, before any work.

    Args:
        texts: as they were typed.
        known: names of figures; any is taken if there are none.

    Raises:
        BitlowerError: one is no condition, or on a figure that nothing measures.
    """
    conditions, names = tuple(map(Condition.parse, texts or ())), list(known)
    for condition in conditions:
        if names and condition.name not in names:
            raise BitlowerError(
                f"--fail-if {str(condition)!r}: there is no figure {condition.name!r}",
                hint=nearest(condition.name, names),
            )
    return conditions


@dataclass(frozen=True)
class Judgement:
    """What conditions make of a model: whether all its figures are accepted, and the line that says so."""

    accepted: bool
    text: str


def judge(conditions: Sequence[Condition], figures: Mapping[str, float]) -> Judgement:
    """Hold figures to conditions.

    Args:
        conditions: of the command line.
        figures: by name.

    Raises:
        BitlowerError: a figure was not measured.
    """
    figures = {name.replace("-", "_"): value for name, value in figures.items()}
    for condition in conditions:
        if condition.name not in figures:
            raise BitlowerError(
                f"--fail-if {str(condition)!r}: {condition.name} was not measured",
                hint=f"measured were {', '.join(figures) or 'no figures'}",
            )
    said = [f"{c.name} is {figures[c.name]:.4g} and fails if {c.operator} {c.limit:g}" for c in conditions]
    failed = [line for line, c in zip(said, conditions, strict=True) if c.holds(figures[c.name])]
    return Judgement(not failed, f"REGRESSION: {'; '.join(failed)}" if failed else f"ACCEPT: {'; '.join(said)}")
