"""Hugging Face folders with packed weights, for transformers, vLLM and GPTQModel, verified against the Program."""

from bitlower.backends._level import check_level
from bitlower.backends.checkpoint._artefact import ArtefactReport
from bitlower.backends.checkpoint._artefact import verify_artefact as verify
from bitlower.backends.checkpoint._export import ExportReport, Options, check_program, export, supports
from bitlower.backends.checkpoint._verification import Verification

__all__ = [
    "ArtefactReport",
    "ExportReport",
    "Options",
    "Verification",
    "check_level",
    "check_program",
    "export",
    "supports",
    "verify",
]
