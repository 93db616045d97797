"""Numbers as files have them: with the digits that matter, and only those that JSON can hold."""

from __future__ import annotations

import math
from typing import overload

DIGITS = 6
"""Significant digits of figures in files, if nothing else is said."""


@overload
def significant(value: float, digits: int = DIGITS) -> float | None: ...
@overload
def significant(value: None, digits: int = DIGITS) -> None: ...
def significant(value: float | None, digits: int = DIGITS) -> float | None:
    """``value`` with so many significant digits; None for what is not finite, and for None."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None
