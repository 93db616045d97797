"""Pipeline text: ``analyze-outliers,gptq{bits=4 group-size=128}``, parsed and printed so that it round-trips."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bitlower.ir import BitlowerError, shorten
from bitlower.ir.json_files import DIGITS, parse_json
from bitlower.ir.plugins.parameters import plain_parameters
from bitlower.passes._machinery.base import Pass
from bitlower.passes._machinery.registry import make_pass

LONGEST = 200_000
"""Characters of a pipeline,"""
PASSES = 200
"""passes in it,"""
DEPTH = 30
"""and how deep its lists may lie in each other."""
_AROUND = 60
"""Characters shown on either side of a mistake."""
_INT = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf)")
_WORDS = {"true": True, "false": False, "none": None}
_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[,{}\[\]=])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<bare>[^\s,{}\[\]="]+))""", re.DOTALL
)
_END = "the end"


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


class _TextError(Exception):
    """Something is wrong at ``start``."""

    def __init__(self, problem: str, start: int) -> None:
        super().__init__(problem)
        self.start = start


def _lex(text: str) -> Iterator[_Token]:
    """The tokens of pipeline text.

    The grammar is::

        pipeline = [ pass { "," pass } ]
        pass     = name [ "{" { field } "}" ]
        field    = name "=" value
        value    = "[" { value } "]" | quoted | bare
        quoted   = a JSON string: in double quotes, with backslash escapes
        bare     = one or more characters other than white space and , { } [ ] = "
        name     = bare, in kebab-case

    White space separates fields and the values of a list, and may stand between any two tokens. A bare value is
    ``true``, ``false``, ``none``, an integer, a decimal number (``0.5``, ``1e-3``, ``inf``), or else a string; a
    string that looks like one of the former is quoted. Structured parameters are quoted JSON.
    """
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _TextError("the quote is not closed", text.index('"', position))
        kind = match.lastgroup or ""
        token = match.group(kind)
        yield _Token(token if kind == "mark" else kind, token, match.start(kind))
        position = match.end()
    yield _Token(_END, "", end)


class _Parser:
    """Recursive descent over the tokens; one method a rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_lex(text))
        self.position = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def take(self, kind: str, what: str) -> _Token:
        token = self.token
        if token.kind != kind:
            actual = f", found {shorten(repr(token.text))}" if token.text else ""
            raise _TextError(f"expected {what}{actual}", token.start)
        self.position += 1
        return token

    def pipeline(self) -> tuple[Pass, ...]:
        passes: list[Pass] = []
        while self.token.kind != _END:
            if passes:
                comma = self.take(",", "',' between passes")
                if len(passes) == PASSES:
                    raise _TextError(f"a pipeline has at most {PASSES} passes", comma.start)
            passes.append(self.pass_())
        return tuple(passes)

    def pass_(self) -> Pass:
        name = self.take("bare", "the name of a pass")
        fields: dict[str, Any] = {}
        starts: dict[str, int] = {}
        if self.token.kind == "{":
            self.take("{", "'{'")
            while self.token.kind != "}":
                key = self.take("bare", "a parameter (they are separated by spaces) or '}'")
                if key.text in fields:
                    raise _TextError(f"the parameter {key.text!r} is given twice", key.start)
                self.take("=", f"'=' after {key.text!r}")
                starts[key.text] = key.start
                fields[key.text] = self.value()
            self.take("}", "'}'")
        try:
            return make_pass(name.text, fields)
        except BitlowerError as error:
            named = [start for key, start in starts.items() if repr(key) in str(error.message)]
            raise _TextError(str(error), named[0] if named else name.start) from error

    def value(self, depth: int = 0) -> Any:
        if self.token.kind == "[":
            start = self.take("[", "'['").start
            if depth == DEPTH:
                raise _TextError(f"lists are nested deeper than {DEPTH} levels", start)
            items = []
            while self.token.kind != "]":
                items.append(self.value(depth + 1))
            self.take("]", "']'")
            return items
        if self.token.kind == "quoted":
            token = self.take("quoted", "a string")
            try:
                return parse_json(token.text, strict=False)
            except ValueError as error:
                raise _TextError(f"a broken string: {error}", token.start) from None
        token = self.take("bare", "a value")
        if len(token.text) > DIGITS and _FLOAT.fullmatch(token.text):
            raise _TextError(f"a number has {len(token.text)} digits", token.start)
        return _bare_value(token.text)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes that ``text`` names; the grammar stands at :func:`_lex`.

    Raises:
        BitlowerError: a syntax error, an unknown pass or parameter, or a value that does not fit; shows the text with
            a caret.
    """
    if len(text) > LONGEST:
        raise BitlowerError(f"the pipeline has {len(text)} characters", hint=f"{LONGEST} are read at most")
    try:
        return _Parser(text).pipeline()
    except _TextError as error:
        raise BitlowerError(f"{error}\n{_pointer(text, error.start)}") from error.__cause__


def _pointer(text: str, start: int) -> str:
    """The line of ``text`` around the place ``start``, and a caret below it."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", start)
    last = len(text) if last < 0 else last
    left = first if start - first <= _AROUND else start - _AROUND
    right = last if last - start <= _AROUND else start + _AROUND
    before = "…" * (left > first) + text[left:start]
    return f"  {before}{text[start:right]}{'…' * (right < last)}\n  {' ' * len(before)}^"


def format_pipeline(passes: Iterable[Pass]) -> str:
    """The text of ``passes``, defaults left out: ``parse_pipeline(format_pipeline(p)) == p``."""
    return ",".join(map(_format_pass, passes))


def _format_pass(pass_: Pass) -> str:
    fields = [f"{key}={_format_value(value)}" for key, value in plain_parameters(pass_).items()]
    return f"{pass_.name}{{{' '.join(fields)}}}" if fields else pass_.name


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{' '.join(map(_format_value, value))}]"
    if isinstance(value, dict):
        return json.dumps(json.dumps(value, sort_keys=True, separators=(",", ":")), ensure_ascii=False)
    match = _TOKEN.fullmatch(value)
    bare = match is not None and match.group("bare") == value and isinstance(_bare_value(value), str)
    return value if bare else json.dumps(value, ensure_ascii=False)


def _bare_value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
