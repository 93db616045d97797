"""The reports of passes: printed when a pass is done, and written into the artifact."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from bitlower.ir import Program
from bitlower.ir.charts import chart_form
from bitlower.passes import Context, Observer, Pass, Report
from bitlower.tools.report.chart_file import chart_file

FOLDER = "reports"
"""Where reports are in an artifact."""
TENSORS = f"{FOLDER}/tensors.json"
"""What is known of every quantized tensor; no pass is called so."""


class Reports(Observer):
    """Prints every report that a pass leaves, and keeps its text.

    Args:
        note: prints a text.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._before: dict[type, Any] = {}
        self.files: dict[str, str] = {}
        """Texts by file name: ``reports/<pass>.json``, all fields with the summary and
        charts, and ``reports/<pass>.svg``, the charts of lines and bars if it has any. ``<pass>-2`` is of the second
        step of that name. What a later pass changes in the report of another stands in the other's file."""
        self._places: dict[type, tuple[str, int]] = {}

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Note what is there already."""
        self._before = dict(context.results)

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Print what is new, and keep it."""
        for kind, result in context.results.items():
            if isinstance(result, Report) and self._before.get(kind) is not result:
                self._take(pass_.name, kind, result)

    def _take(self, name: str, kind: type, report: Report) -> None:
        owner, number = self._places.get(kind, (name, 0))
        if owner == name:
            number += 1
            self._note(f"{name}: {report.text()}")
        self._places[kind] = owner, number
        place = f"{FOLDER}/{owner}" if number == 1 else f"{FOLDER}/{owner}-{number}"
        form = {"report": kind.__name__, "summary": report.summary(), **dataclasses.asdict(report)}  # type: ignore[call-overload]
        charts = list(report.charts())
        if charts:
            form["charts"] = [chart_form(chart) for chart in charts]
        self.files[f"{place}.json"] = report_text(form)
        if picture := chart_file(charts):
            self.files[f"{place}.svg"] = picture


def report_text(form: dict[str, Any]) -> str:
    """JSON with a line for each field, and for each row of a list; numbers that JSON does not have are null."""
    form, fields = _finite(form), []
    for key, value in form.items():
        rows = (
            ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value) if isinstance(value, list) else ""
        )
        text = f"[\n{rows}\n ]" if rows else json.dumps(value, ensure_ascii=False)
        fields.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _finite(form: Any) -> Any:
    """Plain data with None for the numbers that JSON does not have."""
    if isinstance(form, dict):
        return {key: _finite(value) for key, value in form.items()}
    if isinstance(form, list | tuple):
        return [_finite(value) for value in form]
    return None if isinstance(form, float) and not math.isfinite(form) else form
