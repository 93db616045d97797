"""Many numbers as a few: sorted, at even distances."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from bitlower.ir.digits import significant

PLACES = 64
"""Numbers that stay of many."""
DIGITS = 4
"""Their significant digits."""


def even(length: int) -> Iterable[int]:
    """At most :data:`PLACES` places from 0 to ``length - 1``, the first and the last among them."""
    count = min(length, PLACES)
    return (round(i * (length - 1) / max(count - 1, 1)) for i in range(count))


def spread(values: torch.Tensor) -> dict[str, Any]:
    """``count`` of the values, of any shape, and ``sorted``, from the least to the greatest."""
    ordered = values.detach().reshape(-1).float().sort().values
    return {
        "count": len(ordered),
        "sorted": [significant(float(ordered[i]), DIGITS) for i in even(len(ordered))],
    }
