"""Model cards of the Hugging Face hub: the file ``README.md`` beside a model, and what its front matter says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

CARD = "README.md"
_FENCE = "---"


def front_matter(card: bytes) -> dict[str, Any]:
    """What stands between the two fences at the top of a card; nothing where there are none, or it is damaged."""
    text = card.decode("utf-8", errors="replace").lstrip("\ufeff")
    lines = text.splitlines()
    if not lines or lines[0].strip() != _FENCE or _FENCE not in lines[1:]:
        return {}
    try:
        form = YAML(typ="safe", pure=True).load("\n".join(lines[1 : lines.index(_FENCE, 1)]))
    except YAMLError:
        return {}
    return form if isinstance(form, dict) else {}


def with_front_matter(form: Mapping[str, Any], body: str) -> str:
    """A card; values are written as JSON, which YAML is a superset of, and those that are empty are left out."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in form.items() if value]
    return "\n".join([_FENCE, *lines, _FENCE, "", body])
