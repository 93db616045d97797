"""What other tools call schemes, and what comes nearest here."""

from __future__ import annotations

_INT8 = "did you mean W8A8 (static activations) or W8A8-token (dynamic ones)?"
_INT4 = "did you mean W4A16-g128 (weights alone)?"
FOREIGN_NAMES = {
    "int8": _INT8,
    "w8a8_int8": _INT8,
    "q8_0": "did you mean W8A16-g32 (weights alone)?",
    "dynamic": "did you mean W8A8-token?",
    "int8_dynamic": "did you mean W8A8-token?",
    "int8_weight_only": "did you mean W8A16 (weights alone)?",
    "int4": _INT4,
    "int4_weight_only": _INT4,
    "w4": _INT4,
    "w8": "did you mean W8A16 (weights alone)?",
    "nf4": f"grids are of equal steps here; {_INT4}",
    "fp4": f"grids are of equal steps here; {_INT4}",
    "fp8": f"grids are of integers here; {_INT8}",
    "float8": f"grids are of integers here; {_INT8}",
    "q4_0": "did you mean W4A16-g32 (weights alone)?",
    "q4_1": "did you mean W4A16-g32-asym (weights alone)?",
    "q4_k_m": "did you mean W4A16-g32-asym (weights alone), or mixed precision by `assign-precision`?",
    "q4_k_s": "did you mean W4A16-g32-asym (weights alone)?",
    "q5_k_m": "did you mean W5A16-g32-asym (weights alone)?",
    "q6_k": "did you mean W6A16-g32 (weights alone)?",
    "q3_k_m": "did you mean W3A16-g32-asym (weights alone)?",
    "q2_k": "did you mean W2A16-g32-asym (weights alone)?",
}
"""In lower case, with underscores."""


def nearest_scheme(name: str) -> str:
    """What to write in place of another tool's ``name``; empty where it is none."""
    return FOREIGN_NAMES.get(name.lower().replace("-", "_"), "")
