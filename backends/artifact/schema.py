"""Files of an artifact as they must be: what a dataclass says of its fields is what is held against the file."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from bitlower.backends.artifact.json_files import plain_text
from bitlower.ir import CheckError
from bitlower.ir.diagnostics import shorten

T = TypeVar("T")


def parsed(kind: type[T], form: Any, what: str) -> T:
    """``form``, plain data read from JSON, as the dataclass ``kind``; nothing is converted but lists to tuples.

    Args:
        kind: its fields' annotations say what they take; keys that it does not know are left out.
        form: what the file holds.
        what: the file, for the message.

    Raises:
        CheckError: an entry is missing or is something else; the message names it.
    """
    try:
        value: T = _adapter(cast(Any, kind)).validate_json(plain_text(form), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        entry = ".".join(str(part) for part in first["loc"])
        actual = "" if first["type"] == "missing" else f", not {shorten(repr(first['input']))}"
        raise CheckError(f"{what} is damaged: {entry}: {_said(first['msg'])}{actual}") from None
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _said(message: str) -> str:
    return f"{message[:1].lower()}{message[1:]}".removeprefix("input ").removeprefix("value error, ")
