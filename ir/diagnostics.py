"""Errors that people read: what went wrong, where in their model, and how to fix it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

from torch import fx

LINES = 20
"""Lines of a message, and"""
CHARACTERS = 1800
"""its characters: what a screen shows."""
_VALUE = 200
"""Characters of a value that a message quotes: more than a path or a pattern has, less than fills a screen."""
_LONGEST_NAME = 100
"""Characters of a name that is listed, or compared with others: nobody mistypes a longer one."""
_LISTED = 60
"""Names in a list of what is known; a model has more layers than anybody reads."""
_COMPARED = 20_000
"""Names that a mistyped one is compared with: a vocabulary of 150,000 would take seconds."""


def shorten(text: str, limit: int = _VALUE) -> str:
    """``text`` with its middle cut out where it has more than ``limit`` characters.

    >>> shorten("a" * 1000, 20)
    'aaaaaaaaa … aaaaaaaa'
    """
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 2
    return f"{text[: limit - 3 - tail]} … {text[len(text) - tail :]}"


def screenful(text: str) -> str:
    """``text`` as one can print it: at most ``LINES`` lines and ``CHARACTERS`` characters, no control characters."""
    return _cut("".join(map(_printable, _cut(text))))


def _cut(text: str) -> str:
    lines = text.split("\n", LINES)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"… and {text.count(chr(10)) + 2 - LINES} more lines"]
    if sum(map(len, lines)) > CHARACTERS:
        lines = [shorten(line, CHARACTERS // len(lines)) for line in lines]
    return "\n".join(lines)


def _printable(character: str) -> str:
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) in ("Zs", "Cn", "Co"):
        return character
    return character.encode("unicode-escape").decode()


class BitlowerError(Exception):
    """Bad input or a misuse of the program; the command line prints it as one line and exits with 2.

    Args:
        message: names the thing and the place; what does not fit on a screen is cut out of its middle.
        hint: the fix, if one is known; it is printed after the message.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = screenful(message)
        self.hint = screenful(hint)
        super().__init__(screenful(f"{self.message}; {self.hint}" if hint else self.message))


class CheckError(BitlowerError):
    """A check of the work itself failed (verification, a contract, an artifact); the command line exits with 1."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``name``: the nearest of ``known``, then all of them (the first ones, if they are many).

    >>> nearest("quantise", ["quantize", "clean"])
    "did you mean 'quantize'? known: clean, quantize"
    """
    choices = sorted(known)
    comparable = choices[:_COMPARED] if len(name) <= _LONGEST_NAME else []
    close = get_close_matches(name, [c for c in comparable if len(c) <= _LONGEST_NAME], n=1, cutoff=0.5)
    listing = f"known: {_listing(choices)}" if choices else "none is known"
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def _listing(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(shorten(name, _LONGEST_NAME) for name in names[:_LISTED]) + more


def describe(node: fx.Node) -> str:
    """One line about ``node``: its name and target, the model's module path, and the source line that traced it."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    parts = [f"%{node.name} ({node.op} {target})"]
    if node.meta.get("path"):
        parts.append(f"in {node.meta['path']}")
    if node.meta.get("source"):
        parts.append(f"at {node.meta['source']}")
    return " ".join(parts)
