"""What a run gave and what it took: the table at the end, and the same as plain data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from bitlower.passes import PassTime
from bitlower.tools.render import format_bytes
from bitlower.tools.report.page import FILE as REPORT
from bitlower.tools.runs.float_share import FloatPart
from bitlower.tools.verdict.verdict import Verdict


@dataclass(frozen=True)
class RunSummary:
    """A finished run.

    Args:
        pipeline: the passes as text.
        output: the artifact's folder; None if nothing was written.
        stages: what took how long, and the peak of resident bytes meanwhile, in order.
        peak_bytes: the peak of resident bytes of the whole process.
        float_bytes: all tensors of the float model.
        artifact_bytes: all files of the artifact.
        files: the bytes of each file of the artifact.
        ledger: what each lossy pass cost.
        reports: what each backend said, by its name.
        notes: what was done to the model that the user should know, a line each.
        floats: the parameters that stay in float, by what reads them.
        verdicts: on what each backend wrote, by its name; on the program, by an empty name, if nothing was written.
        advice: what would do better, a line each.
    """

    pipeline: str
    output: Path | None
    stages: tuple[PassTime, ...]
    peak_bytes: int
    float_bytes: int
    files: dict[str, int] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    floats: tuple[FloatPart, ...] = ()
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    @property
    def artifact_bytes(self) -> int:
        """All files of the artifact together."""
        return sum(self.files.values())

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "pipeline": self.pipeline,
            "output": str(self.output) if self.output else None,
            "stages": [
                {"name": s.name, "seconds": round(s.seconds, 3), "peak_bytes": s.peak_bytes} for s in self.stages
            ],
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "float_bytes": self.float_bytes,
            "artifact_bytes": self.artifact_bytes,
            "files": self.files,
            "ledger": self.ledger,
            "reports": self.reports,
            "notes": list(self.notes),
            "float_parameters": [part.to_dict() for part in self.floats],
            "verdicts": {name: verdict.to_dict() for name, verdict in self.verdicts.items()},
        }

    def text(self) -> tuple[str | Table, ...]:
        """What people read at the end: a verdict and its figures for each artifact, what stayed float, and the time."""
        lines: list[str | Table] = []
        for name, verdict in self.verdicts.items():
            prefix = f"{name}: " if len(self.verdicts) > 1 else ""
            lines += [f"{prefix}{verdict.line}; {self.seconds:.0f} s", verdict.table()]
            lines += [
                f"{name}: in float though it has codes: {kernel}"
                for kernel in _missing_kernels(self.reports.get(name, {}))
            ]
        lines += [f"stays in float: {part}" for part in self.floats]
        stages = ", ".join(f"{stage.name} {stage.seconds:.1f}" for stage in self.stages)
        lines.append(f"seconds: {stages}; peak memory {format_bytes(self.peak_bytes)}")
        if self.output:
            lines.append(
                f"{self.output}: what each pass cost is in ledger.json, what was compared in verification.json"
            )
            pages = [name for name in self.files if name.rpartition("/")[2] == REPORT]
            lines += [f"to look at: {self.output / name}" for name in pages]
        return (*lines, *self.advice)


def _missing_kernels(report: dict[str, Any]) -> list[str]:
    """The multiplications that the runtime computes in float though their operands have codes."""
    kernels = report.get("verification", {}).get("kernels")  # a list of those that ran, where a library is written
    return list(kernels.get("fell_back", ())) if isinstance(kernels, dict) else []


def flatten(form: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and words of nested plain data as ``a.b`` and a value; lists are left out."""
    for key, value in form.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else value


def peak_bytes() -> int:
    """The peak of this process's resident bytes since it started."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
