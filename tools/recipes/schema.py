"""JSON schemas of passes, so that editors complete and check recipes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from bitlower.ir.plugins.field_docs import field_docs
from bitlower.ir.plugins.kinds import schema_bounds, split_bounds
from bitlower.ir.plugins.parameters import plain
from bitlower.passes import Losses, Pass, known_losses, known_passes, parameter_types
from bitlower.passes.training import Loss

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def passes_schema() -> dict[str, Any]:
    """The schema of one item under ``passes``: a known pass's name, or its name with parameters."""
    return _named_schema(known_passes())


def _named_schema(classes: Mapping[str, type[Pass | Loss]]) -> dict[str, Any]:
    """The schema of a known name, or of one name with its parameters."""
    with_parameters = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": {name: parameters_schema(cls) for name, cls in classes.items()},
    }
    return {"anyOf": [{"type": "string", "examples": list(classes)}, with_parameters]}


def parameters_schema(cls: type[Pass | Loss]) -> dict[str, Any]:
    """The schema of the parameters of a pass or loss."""
    kinds, documentation = parameter_types(cls), field_docs(cls)
    properties = {}
    for field, (name, kind) in zip(dataclasses.fields(cls), kinds.items(), strict=True):
        properties[name] = type_schema(kind)
        if documentation.get(field.name):
            properties[name]["description"] = documentation[field.name]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if default is not dataclasses.MISSING:
            properties[name]["default"] = plain(kind, default)
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return {"type": "object", "description": summary, "properties": properties, "additionalProperties": False}


def type_schema(kind: Any) -> dict[str, Any]:
    """The schema of a parameter's type and bounds."""
    kind, bounds = split_bounds(kind)
    if bounds:
        return type_schema(kind) | schema_bounds(bounds)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return {"anyOf": [type_schema(argument) for argument in arguments]}
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": type_schema(arguments[0])}
        return {"type": "array", "prefixItems": list(map(type_schema, arguments)), "items": False}
    if typing.get_origin(kind) is typing.Literal:
        return {"enum": list(arguments)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if kind is Losses:
        return {"type": "array", "items": _named_schema(known_losses()), "minItems": 1}
    forms = [("parse", {"type": "string"}), ("from_dict", {"type": "object"})]
    return {"anyOf": [form for method, form in forms if hasattr(kind, method)]}
