"""Plain data as YAML that every YAML reader reads alike: plain words, else JSON scalars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_RESERVED = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan"})


def yaml_text(data: Mapping[str, Any]) -> str:
    """``data`` as block-style YAML, in its order; what lies deeper than lists is in flow style."""
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{_scalar(key)}:", *(f"  {line}" for line in _lines(value))]
        elif isinstance(value, list) and value:
            lines += [f"{_scalar(key)}:", *(f"  - {_item(item)}" for item in value)]
        else:
            lines.append(f"{_scalar(key)}: {_scalar(value)}")
    return lines


def _item(item: Any) -> str:
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, params),) = item.items()
        return f"{_scalar(name)}: {_scalar(params)}"
    return _scalar(item)


def _scalar(value: Any) -> str:
    """A JSON value, which is YAML's flow style; non-finite floats as YAML writes them."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(k))}: {_scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
