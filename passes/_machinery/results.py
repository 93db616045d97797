"""Results in the context (frozen dataclasses of plain data) as JSON and back, for the cache and the reproducer.

A type is written as ``module:name`` and found again only in bitlower or in the package of the pass that left the
result; it must be a dataclass. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from bitlower.ir import BitlowerError

Form = list[list[Any]]


def encode_results(results: Mapping[type, Any]) -> Form:
    """The results as plain data, in the order of their types' names.

    Raises:
        BitlowerError: a result does not survive the way there and back.
    """
    forms = []
    for kind, value in results.items():
        name = f"{kind.__module__}:{kind.__qualname__}"
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
            form = adapter.dump_python(value, mode="json")
            whole = dataclasses.is_dataclass(kind) and bool(adapter.validate_python(form) == value)
        except (PydanticUserError, ValueError, TypeError, RuntimeError) as error:
            raise BitlowerError(f"the result {name} cannot be saved ({str(error).splitlines()[0]})") from error
        if not whole:
            raise BitlowerError(f"the result {name} cannot be saved", hint="use frozen dataclasses of plain data")
        forms.append([name, form])
    return sorted(forms, key=lambda form: str(form[0]))


def decode_results(forms: Form, package: str) -> dict[type, Any]:
    """The inverse of :func:`encode_results`; types come from bitlower or ``package``.

    Raises:
        BitlowerError: a type from elsewhere, an unknown one, or data that do not fit it.
    """
    results: dict[type, Any] = {}
    for name, form in forms:
        module, _, qualname = name.partition(":")
        if module.partition(".")[0] not in ("bitlower", package):
            raise BitlowerError(f"a saved result has the foreign type {name}")
        try:
            kind = getattr(importlib.import_module(module), qualname)
            if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
                raise BitlowerError(f"a saved result has the type {name}, which is no dataclass")
            results[kind] = TypeAdapter(kind).validate_python(form)
        except (ImportError, AttributeError, ValidationError) as error:
            raise BitlowerError(f"the saved result {name} does not fit this version") from error
    return results
