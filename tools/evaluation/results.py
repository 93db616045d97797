"""What an evaluation measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """What was measured: every metric in percent, over ``samples`` rows of the data file."""

    target: str
    task: str
    data: str
    samples: int
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        metrics = {name: round(value, 4) for name, value in self.metrics.items()}
        return {"target": self.target, "task": self.task, "data": self.data, "samples": self.samples, **metrics}
