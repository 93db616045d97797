"""ONNX for onnxruntime: standard Q/DQ graphs that run on its integer kernels, verified against the Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitlower.backends.onnx_qdq.backend import ExportReport, OnnxQdq
from bitlower.backends.onnx_qdq.graph.code_operators import CodeOperator, Reading
from bitlower.backends.onnx_qdq.model import OnnxEncoderDecoder, OnnxModel
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.pipeline import add_rule
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule
from bitlower.backends.onnx_qdq.verify.artifact import ArtifactReport
from bitlower.backends.onnx_qdq.verify.artifact import verify_artifact as verify
from bitlower.backends.onnx_qdq.verify.compare import verify_export
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.backends.onnx_qdq.write.files import MODEL
from bitlower.ir import Batch, Program

__all__ = [
    "APPLIED",
    "MODEL",
    "ArtifactReport",
    "CodeOperator",
    "Editor",
    "ExportReport",
    "OnnxEncoderDecoder",
    "OnnxModel",
    "OnnxQdq",
    "Reading",
    "Rule",
    "Verification",
    "add_rule",
    "export",
    "verify",
    "verify_export",
]


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> ExportReport:
    """:meth:`OnnxQdq.export` with ``options``."""
    return OnnxQdq(**options).export(program, folder, batches, provenance)
