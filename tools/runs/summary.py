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
from bitlower.tools.render import Cell, format_bytes, make_table
from bitlower.tools.runs.float_share import FloatPart


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
        }

    def tables(self) -> tuple[Table, ...]:
        """The stages, what each lossy pass cost, and the artifact."""
        stages = [(s.name, round(s.seconds, 2), format_bytes(s.peak_bytes)) for s in self.stages]
        stages.append(("total", round(self.seconds, 2), format_bytes(self.peak_bytes)))
        tables = [make_table("stages", ("stage", "seconds", "peak memory"), stages)]
        if self.ledger.get("rows"):
            columns = ("pass", "output", "size", "relative error", "cosine", "KL divergence", "worst layer")
            tables.append(make_table("ledger (against the float model, held-out data)", columns, self._ledger_rows()))
        if self.output:
            tables.append(make_table("artifact", ("", ""), self._artifact_rows()))
        return tuple(tables)

    def _ledger_rows(self) -> Iterator[tuple[Cell, ...]]:
        for row in self.ledger["rows"]:
            losses = row.get("outputs") or {"": {}}
            for place, (output, loss) in enumerate(losses.items()):
                numbers = (loss.get("relative_error"), loss.get("cosine"), loss.get("kl_divergence"))
                first = (row["pass"], output, format_bytes(row["bytes"])) if place == 0 else ("", output, "")
                yield (*first, *numbers, _worst_layer(row) if place == 0 else "")

    def _artifact_rows(self) -> Iterator[tuple[Cell, ...]]:
        yield "folder", str(self.output)
        yield "size", f"{format_bytes(self.float_bytes)} → {format_bytes(self.artifact_bytes)}"
        for name, size in self.files.items():
            yield name, format_bytes(size)
        yield from (("parameters in float" if place == 0 else "", str(part)) for place, part in enumerate(self.floats))
        for backend, report in self.reports.items():
            yield from ((f"{backend}: {key}", str(value)) for key, value in flatten(_highlights(report)))
            yield from ((f"{backend}: missing kernel", str(name)) for name in _missing_kernels(report))


def _highlights(report: dict[str, Any]) -> dict[str, Any]:
    """Of a backend's report: how what was written compares with the Program, and what the runtime makes of it."""
    verification = report.get("verification", {})
    return {key: verification[key] for key in ("runtime", "kernels", "summary") if key in verification}


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


def _worst_layer(row: dict[str, Any]) -> str:
    layers = [layer for layer in row.get("layers", []) if layer["sqnr_db"] is not None]
    if not layers:
        return ""
    worst = min(layers, key=lambda layer: float(layer["sqnr_db"]))
    return f"{worst['path'] or worst['node']} {worst['sqnr_db']:.1f} dB"
