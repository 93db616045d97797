"""Patterns that name parts of a model in recipes: module paths, globs over them, ``re:`` expressions, or roles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bitlower.ir import BitlowerError, nearest


class Patterns:
    """A list of patterns that remembers which of them have matched.

    Args:
        patterns: a module path, a glob over module paths (either also matches all below the modules it names), or
            ``re:`` and a regular expression that has to match the whole path.

    Raises:
        BitlowerError: a regular expression is malformed.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._unused = set(self.patterns)
        self._expressions = {p: _compile(p) for p in self.patterns if p.startswith("re:")}

    def match(self, *names: str) -> bool:
        """Whether any pattern matches any of ``names``; every pattern that does counts as used."""
        hits = [p for p in self.patterns if any(self._matches(p, name) for name in names)]
        self._unused.difference_update(hits)
        return bool(hits)

    def require_used(self, what: str, names: Iterable[str]) -> None:
        """Fail on patterns that have matched nothing.

        Raises:
            BitlowerError: there is one; the nearest of ``names`` is shown.
        """
        for pattern in self.patterns:
            if pattern in self._unused:
                hint = nearest(pattern.removeprefix("re:"), names).partition("? ")[0]
                raise BitlowerError(
                    f"the {what} pattern {pattern!r} matches nothing in the model",
                    hint=f"{hint}?" if hint.startswith("did you mean") else "see `bitlower plan` for the names",
                )

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern in self._expressions:
            return self._expressions[pattern].fullmatch(name) is not None
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise BitlowerError(f"the pattern {pattern!r} is no regular expression: {error}") from None
