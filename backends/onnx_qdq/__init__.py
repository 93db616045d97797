"""ONNX for onnxruntime: standard Q/DQ graphs that run on its integer kernels, verified against the Program."""

from bitlower.backends._level import check_level
from bitlower.backends.onnx_qdq._export import ExportReport, Options, export
from bitlower.backends.onnx_qdq._manifest import ArtefactReport
from bitlower.backends.onnx_qdq._manifest import verify_artefact as verify
from bitlower.backends.onnx_qdq._verification import Verification
from bitlower.backends.onnx_qdq._verify import verify_export

__all__ = [
    "ArtefactReport",
    "ExportReport",
    "Options",
    "Verification",
    "check_level",
    "export",
    "verify",
    "verify_export",
]
