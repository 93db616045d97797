"""The rewrite rules that bring what models write by hand to one form, in the order in which they are tried."""

from __future__ import annotations

from bitlower.passes.canonical import _attention, _conv, _gelu, _half, _linear, _norm, _patches, _weight_norm

RULES = (
    *_half.RULES,
    *_weight_norm.RULES,
    *_conv.RULES,
    *_patches.RULES,
    *_linear.RULES,
    *_norm.RULES,
    *_gelu.RULES,
    *_attention.RULES,
)
