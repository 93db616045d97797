"""Histograms of values that arrive in parts and whose ends nobody knows beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

FINE = 4096
"""Bins while values arrive: enough to join them to the few that are shown."""
SHOWN = 64
"""Bins of the result at most."""


@dataclass
class GrowingHistogram:
    """Counts of values in bins of equal width around 0; exact whatever the order in which values arrive.

    The bins reach from ``-reach`` to ``reach``, a power of two. A larger value doubles it, which joins bins in pairs.
    Values that are not finite are left out.
    """

    reach: float = 0.0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(FINE, dtype=torch.int64))
    minimum: float = math.inf
    maximum: float = -math.inf

    def add(self, values: torch.Tensor) -> None:
        """Count ``values``, of any shape."""
        values = values.detach().reshape(-1).float()
        values = values[values.isfinite()]
        if not values.numel():
            return
        low, high = (float(end) for end in torch.aminmax(values))
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._reach_to(max(-low, high))
        places = (torch.floor(values.double() / self.reach * (FINE // 2)).long() + FINE // 2).clamp_(0, FINE - 1)
        self.counts += torch.bincount(places, minlength=FINE)

    def _reach_to(self, size: float) -> None:
        if not self.reach:
            self.reach = 2.0 ** math.ceil(math.log2(size)) if size else 1.0
            return
        while self.reach < size:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (FINE // 4, FINE // 4))
            self.reach *= 2

    def to_dict(self) -> dict[str, Any]:
        """At most ``SHOWN`` bins from the first to the last that is not empty: ``start``, ``step``, ``counts``."""
        filled = self.counts.nonzero().reshape(-1)
        if not len(filled):
            return {"start": 0.0, "step": 0.0, "counts": []}
        first, last = int(filled[0]), int(filled[-1]) + 1
        joined = math.ceil((last - first) / SHOWN)
        part = torch.nn.functional.pad(self.counts[first:last], (0, -(last - first) % joined))
        width = 2 * self.reach / FINE
        counts = part.reshape(-1, joined).sum(1).tolist()
        return {"start": first * width - self.reach, "step": joined * width, "counts": counts}
