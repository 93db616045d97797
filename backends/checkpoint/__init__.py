"""Hugging Face folders with packed weights, for transformers, vLLM and GPTQModel, verified against the Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitlower.backends.checkpoint.backend import Checkpoint, ExportReport
from bitlower.backends.checkpoint.container import Container, Entry, Tensors
from bitlower.backends.checkpoint.format import Format, Packed, Weight
from bitlower.backends.checkpoint.safetensors import Safetensors
from bitlower.backends.checkpoint.verify.artifact import ArtifactReport
from bitlower.backends.checkpoint.verify.artifact import verify_artifact as verify
from bitlower.backends.checkpoint.verify.record import Verification
from bitlower.ir import Batch, Program

__all__ = [
    "ArtifactReport",
    "Checkpoint",
    "Container",
    "Entry",
    "ExportReport",
    "Format",
    "Packed",
    "Safetensors",
    "Tensors",
    "Verification",
    "Weight",
    "export",
    "verify",
]


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> ExportReport:
    """:meth:`Checkpoint.export` with ``options``."""
    return Checkpoint(**options).export(program, folder, batches, provenance)
