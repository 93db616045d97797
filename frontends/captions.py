"""Models that say how well texts and pictures fit (CLIP, SigLIP): what tells them from others, and their texts.

Texts of SigLIP are padded to the length that it was trained with, and its mask says of no token that it is padding: it
attends to all of them, and says what a text is about at the last one.
"""

from __future__ import annotations

from typing import Any

from bitlower.frontends._tasks import PIXELS
from bitlower.ir import Program
from bitlower.ir.tokens import TOKENS, is_past

_FULL_LENGTH = ("siglip", "siglip_text_model")
"""Kinds of models, as configurations name them, whose texts all have one length (Zhai et al., 2023)."""


def reads_captions(program: Program) -> bool:
    """Whether ``program`` reads texts and pictures, and goes on from no earlier tokens."""
    names = {spec.name for spec in program.inputs}
    return {TOKENS, PIXELS} <= names and not any(map(is_past, program.inputs))


def attends_to_padding(program: Program) -> bool:
    """Whether each text of ``program`` is padded to the most tokens that it takes, all of which it attends to."""
    return program.config.get("model_type") in _FULL_LENGTH


def text_settings(program: Program) -> dict[str, Any]:
    """What the configuration says about the texts: all of it, or a part where there is another for pictures."""
    part = program.config.get("text_config")
    return part if isinstance(part, dict) else program.config
