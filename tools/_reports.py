"""What analyses and searches among the passes found: told when they are done, and written into the artefact."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from bitlower.ir import Program
from bitlower.passes import Context, Observer, Pass


class Reports(Observer):
    """Tells the ``summary()`` of every result that a pass leaves and that has one, and keeps the result.

    Args:
        note: prints a text.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._before: dict[type, Any] = {}
        self.files: dict[str, str] = {}
        """Texts by file name: ``<pass>.json``, the whole result, and ``<pass>.svg``, its picture if it has one."""

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Note what is there already."""
        self._before = dict(context.results)

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Tell what is new."""
        for kind, result in context.results.items():
            if self._before.get(kind) is result or not hasattr(result, "summary"):
                continue
            self._note(f"{pass_.name}: {result.summary()}")
            text = json.dumps(_finite(dataclasses.asdict(result)), indent=1, sort_keys=True)
            self.files[f"{pass_.name}.json"] = f"{text}\n"
            if hasattr(result, "svg"):
                self.files[f"{pass_.name}.svg"] = result.svg()


def _finite(form: Any) -> Any:
    """Plain data with None for the numbers that JSON does not have."""
    if isinstance(form, dict):
        return {key: _finite(value) for key, value in form.items()}
    if isinstance(form, list | tuple):
        return [_finite(value) for value in form]
    return None if isinstance(form, float) and not math.isfinite(form) else form
