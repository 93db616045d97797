"""The rewrite rules that bring what models write by hand to one form, in the order in which they are tried."""

from __future__ import annotations

from bitlower.passes import (
    _attention,
    _canonical_conv,
    _canonical_gelu,
    _canonical_half,
    _canonical_linear,
    _canonical_norm,
)

RULES = (
    *_canonical_half.RULES,
    *_canonical_conv.RULES,
    *_canonical_linear.RULES,
    *_canonical_norm.RULES,
    *_canonical_gelu.RULES,
    *_attention.RULES,
)
