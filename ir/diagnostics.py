"""Errors that people read: what went wrong, where in their model, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import fx


class BitlowerError(Exception):
    """Bad input or a misuse of the program; the command line prints it as one line and exits with 2.

    Args:
        message: names the thing and the place.
        hint: the mend, if one is known; it is printed after the message.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message = message
        self.hint = hint


class CheckError(BitlowerError):
    """A check of the work itself failed (verification, a contract, an artefact); the command line exits with 1."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``name``: the nearest of ``known``, then all of them.

    >>> nearest("quantise", ["quantize", "clean"])
    "did you mean 'quantize'? known: clean, quantize"
    """
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1, cutoff=0.5)
    listing = f"known: {', '.join(choices)}" if choices else "none is known"
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def describe(node: fx.Node) -> str:
    """One line about ``node``: its name and target, the model's module path, and the source line that traced it."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    parts = [f"%{node.name} ({node.op} {target})"]
    if node.meta.get("path"):
        parts.append(f"in {node.meta['path']}")
    if node.meta.get("source"):
        parts.append(f"at {node.meta['source']}")
    return " ".join(parts)
