"""Documentation of a dataclass's fields: the string below each field, read from the source of the class and bases."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from contextlib import suppress
from typing import Any


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The documentation of each field of ``cls``, by its name; a field whose source is not at hand has none."""
    documentation: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        with suppress(OSError, TypeError, SyntaxError):  # the source is not at hand
            [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for field, text in itertools.pairwise(definition.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        documentation[name] = without_markup(inspect.cleandoc(words))
    return documentation


def without_markup(text: str) -> str:
    """A docstring without the markup of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")
