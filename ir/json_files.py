"""The one way to read JSON that others wrote.

JSON as RFC 8259 has it, held to what every reader understands alike: no key twice in an object, no half of a surrogate
pair, numbers that a float can hold, and no deeper than :data:`DEPTH`.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from bitlower.ir.diagnostics import shorten
from bitlower.ir.files import LIMIT, read_bytes

DEPTH = 100
"""Containers inside each other."""
DIGITS = 100
"""Of an integer; a float can hold each of them."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, *, finite: bool = True, strict: bool = True) -> Any:
    """The value of a JSON document.

    Args:
        text: bytes are UTF-8.
        finite: refuse ``NaN``, ``Infinity`` and numbers that overflow, which no JSON has but Python writes.
        strict: refuse control characters in strings.

    Raises:
        ValueError: what is wrong, in a few words.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte-order mark")
    hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _refuse} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, strict=strict, **hooks)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_characters(value)
    return value


def read_json(path: str | os.PathLike[str], *, limit: int = LIMIT, finite: bool = True) -> dict[str, Any]:
    """The object in the regular file ``path``.

    Args:
        path: of UTF-8 text.
        limit: bytes that are read at most.
        finite: as for :func:`parse_json`.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is too large, not JSON, or holds no object; :func:`bitlower.ir.files.reason` says either.
    """
    return object_of(parse_json(read_bytes(path, limit), finite=finite))


def object_of(value: Any) -> dict[str, Any]:
    """``value``, which is a JSON object.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    form = dict(pairs)
    if len(form) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(repr(twice))} is given twice")
    return form


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} is too large")
    return value


def _refuse(text: str) -> float:
    raise ValueError(f"it holds {text}, which is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [item for form in level for item in _items(form) if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep()


def _items(form: Any) -> Any:
    return form.values() if isinstance(form, dict) else form if isinstance(form, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {DEPTH} levels")


def _check_characters(value: Any) -> None:
    """No string holds half of a surrogate pair, which no UTF-8 can say."""
    waiting = [value]
    while waiting:
        form = waiting.pop()
        strings = [form] if isinstance(form, str) else list(form) if isinstance(form, dict) else []
        for text in strings:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"the text {shorten(ascii(text))} holds half of a surrogate pair")
        waiting.extend(_items(form))
