"""What an evaluation measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """What was measured over ``samples`` rows of the data file.

    Args:
        target: the model or artifact.
        task: what was asked.
        data: the file.
        samples: rows, sentences, questions or texts of it.
        metrics: in percent, but for those in ``units``.
        notes: what of the data did not count or how it was read, a line each.
        units: of metrics that are not in percent; empty for a plain number.
    """

    target: str
    task: str
    data: str
    samples: int
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        metrics = {name: round(value, 4) for name, value in self.metrics.items()}
        head = {"target": self.target, "task": self.task, "data": self.data, "samples": self.samples}
        return {**head, **metrics, "notes": list(self.notes)}
