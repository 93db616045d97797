"""What the header of a GGUF file says of licence and origin, as a model card of the Hugging Face hub."""

from __future__ import annotations

import re
from typing import Any

from bitlower.frontends._gguf_header import GgufHeader
from bitlower.ir.model_card import with_front_matter

_COPIED = {"license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link"}
"""Entries of the card, and the keys of the header that hold them."""
_LANGUAGES = "general.languages"
_BASE = "general.base_model.0.repo_url"
_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([^/\s]+/[^/\s?#]+)/?")


def gguf_card(header: GgufHeader) -> bytes:
    """The card; empty where the header says nothing of what a card has."""
    form: dict[str, Any] = {
        key: value for key, name in _COPIED.items() if isinstance(value := header.values.get(name), str)
    }
    if (languages := header.arrays.get(_LANGUAGES)) is not None:
        form["language"] = [_text(entry) for entry in languages.entries]
    if match := _HUB.fullmatch(str(header.values.get(_BASE, ""))):
        form["base_model"] = match[1]
    form = {key: value for key, value in form.items() if value}
    return with_front_matter(form, "").encode() if form else b""


def _text(entry: Any) -> str:
    return entry.decode("utf-8", errors="replace") if isinstance(entry, bytes) else str(entry)
