"""The option ``--fail-if``, and the end of a command that takes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from bitlower.tools.render import Display
    from bitlower.tools.verdict.conditions import Condition

FailIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help='End with exit code 1 if a figure is so: "kl > 0.05", "size_ratio < 3", "spearman < 86"; may be repeated.',
    ),
]


def verdict_conditions(fail_if: Sequence[str] | None) -> tuple[Condition, ...]:
    """Conditions on figures of the verdict.

    Raises:
        BitlowerError: one is no condition, or on a figure that no verdict has.
    """
    from bitlower.tools.verdict.conditions import parse_conditions
    from bitlower.tools.verdict.figures import MEANINGS

    return parse_conditions(fail_if, MEANINGS)


def finish(
    display: Display,
    form: dict[str, Any],
    parts: Sequence[Table | str],
    conditions: Sequence[Condition],
    *figures: Mapping[str, float],
) -> None:
    """Show a result, and end with exit code 1 if a condition holds.

    Args:
        display: where to.
        form: the result as plain data.
        parts: the result for people.
        conditions: of the command line.
        figures: by name; of each model that is judged.

    Raises:
        BitlowerError: a figure was not measured; nothing is shown.
        typer.Exit: a condition holds.
    """
    from bitlower.tools.verdict.conditions import judge

    judged = [judge(conditions, values) for values in figures] if conditions else []
    accepted = all(judgement.accepted for judgement in judged)
    more = {"accepted": accepted, "conditions": [judgement.text for judgement in judged]} if judged else {}
    display.result(form | more, *parts)
    for judgement in judged:
        print(judgement.text, file=sys.stderr)
    if not accepted:
        raise typer.Exit(1)
