"""Numbers as files have them: with the digits that matter, and only those that JSON can hold."""

from __future__ import annotations

import math
from typing import overload

DIGITS = 6
"""Significant digits of figures in files, if nothing else is said."""


def rounded(value: float, digits: int = DIGITS) -> float:
    """``value`` with so many significant digits; what is not finite as it is."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


@overload
def significant(value: float, digits: int = DIGITS) -> float | None: ...
@overload
def significant(value: None, digits: int = DIGITS) -> None: ...
def significant(value: float | None, digits: int = DIGITS) -> float | None:
    """As :func:`rounded`; None for what is not finite, and for None."""
    return rounded(value, digits) if value is not None and math.isfinite(value) else None
