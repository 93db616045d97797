"""Parameters of passes and losses, options of backends: their types, and the way from plain data to them and back.

Plain data are None, bool, int, float, str, lists and mappings. Structured types are classes with ``parse`` (from short
text), ``from_dict`` (from a mapping, back by ``to_dict``) or ``from_list`` (from a list, back by ``to_list``). The
pipeline text and the YAML recipe both go through :func:`build` and :func:`plain_parameters`, so they accept and print
the same things.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import sys
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from bitlower.ir.diagnostics import BitlowerError, nearest, shorten
from bitlower.ir.json_files import parse_json
from bitlower.ir.plugins.kinds import (
    describe_type,
    is_enum,
    is_structured,
    is_union,
    kebab,
    keeps,
    parameter_types,
    split_bounds,
)

T = TypeVar("T")


class MismatchError(ValueError):
    """A value does not fit a type; the text says what the type takes, ``hint`` what may have been meant."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def coerce(kind: Any, value: Any) -> Any:
    """Plain ``value`` as an instance of ``kind``; a value that is one already passes.

    Raises:
        MismatchError: it does not fit, or lies outside the bounds of ``kind``.
        BitlowerError: a structured type refused it.
    """
    inner, bounds = split_bounds(kind)
    if bounds:
        coerced = coerce(inner, value)
        if not keeps(bounds, coerced):
            raise MismatchError(f"takes {describe_type(kind)}, not {show(value)}")
        return coerced
    if is_union(kind):
        return _coerce_union(typing.get_args(kind), value, kind)
    if typing.get_origin(kind) is tuple:
        return _coerce_tuple(typing.get_args(kind), value, kind)
    if typing.get_origin(kind) is typing.Literal:
        options = typing.get_args(kind)
        if any(type(option) is type(value) and option == value for option in options):
            return value
        if value is None and "none" in options:  # the bare word in pipeline text
            return "none"
    elif is_enum(kind):
        if any((type(m.value) is type(value) and m.value == value) or m is value for m in kind):
            return kind(value)
    elif is_structured(kind):
        return _coerce_structured(kind, value)
    elif kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    elif kind is int and type(value) is int and not -(1 << 63) <= value < 1 << 63:
        raise MismatchError(f"takes int of 64 bits, not {show(value)}")
    elif type(value) is kind and not (kind is float and math.isnan(value)):
        return value
    raise MismatchError(f"takes {describe_type(kind)}, not {show(value)}", _meant(kind, value))


def _meant(kind: Any, value: Any) -> str:
    """The choice of ``kind`` that is spelled like ``value``."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if is_enum(kind):
        choices = tuple(member.value for member in kind)
    near = difflib.get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], 1)
    return f"did you mean {near[0]!r}?" if near else ""


def show(value: Any) -> str:
    """``value`` for an error message."""
    return "none" if value is None else shorten(json.dumps(value, default=repr, ensure_ascii=False))


def _coerce_union(members: tuple[Any, ...], value: Any, kind: Any) -> Any:
    """The first member that fits; a string is a string unless it is the JSON form of a structured member."""
    json_text = isinstance(value, str) and value.startswith("{")
    ordered = sorted(members, key=lambda m: is_structured(m) if not json_text else not is_structured(m))
    refusal: BitlowerError | None = None
    for member in ordered:
        try:
            return coerce(member, value)
        except MismatchError:
            continue
        except BitlowerError as error:
            refusal = error
    if refusal is not None:
        raise refusal
    raise MismatchError(f"takes {describe_type(kind)}, not {show(value)}")


def _coerce_tuple(arguments: tuple[Any, ...], value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise MismatchError(f"takes a {describe_type(kind)}, not {show(value)}")
    if arguments[-1] is Ellipsis:
        return tuple(coerce(arguments[0], item) for item in value)
    if len(value) != len(arguments):
        raise MismatchError(f"takes a {describe_type(kind)}, not {len(value)} values")
    return tuple(coerce(argument, item) for argument, item in zip(arguments, value, strict=True))


def _coerce_structured(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if hasattr(kind, "from_dict"):
        value = _from_json(kind, value)
    try:
        if isinstance(value, list | tuple) and hasattr(kind, "from_list"):
            return kind.from_list([_from_json(kind, item) for item in value])
        if isinstance(value, Mapping) and hasattr(kind, "from_dict"):
            return kind.from_dict(value)
        if isinstance(value, str) and hasattr(kind, "parse"):
            return kind.parse(value)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MismatchError(f"takes {describe_type(kind)}, not {show(value)} ({error})") from error
    raise MismatchError(f"takes {describe_type(kind)}, not {show(value)}")


def _from_json(kind: Any, value: Any) -> Any:
    """``value``; what its text says, if that is a mapping in JSON: pipeline text has no other form of it."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise MismatchError(f"takes {describe_type(kind)}; its JSON is broken: {error}") from None


def plain(kind: Any, value: Any) -> Any:
    """``value`` of a parameter of type ``kind`` as plain data: the inverse of :func:`coerce`.

    Raises:
        BitlowerError: the type of ``value`` has no plain form.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        arguments = typing.get_args(_tuple_member(kind)) or (Any, Ellipsis)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return [plain(k, item) for k, item in zip(kinds, value, strict=True)]
    if hasattr(value, "to_list"):
        return value.to_list()
    if not (is_union(kind) and str in typing.get_args(kind)) and hasattr(value, "parse"):
        name = getattr(value, "name", None)
        text = name if isinstance(name, str) else str(value)
        try:
            if type(value).parse(text) == value:
                return text
        except BitlowerError:
            pass  # the name does not say it all: the long form does
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise BitlowerError(f"a parameter of type {type(value).__name__} cannot be printed")


def plain_parameters(owner: Any) -> dict[str, Any]:
    """The parameters that differ from their defaults, by name in kebab-case, as plain data."""
    kinds = parameter_types(type(owner))
    return {kebab(key): plain(kinds[kebab(key)], value) for key, value in changed_fields(owner).items()}


def make(cls: type[T], what: str, parameters: Mapping[str, Any], *, noun: str = "parameter") -> T:
    """The instance of a class of ``what`` with ``parameters``, checked against the annotations of its fields.

    Args:
        cls: a dataclass.
        what: the beginning of messages.
        parameters: plain data, names in kebab-case or with underscores.
        noun: what messages call one of them.

    Raises:
        BitlowerError: a parameter is unknown, doubled, missing, of the wrong type, or refused by the class.
    """
    kinds = parameter_types(cls)
    values: dict[str, Any] = {}
    for key, value in parameters.items():
        name = kebab(str(key))
        if name not in kinds:
            raise BitlowerError(f"{what} has no {noun} {shorten(repr(str(key)))}", hint=nearest(name, kinds))
        if name.replace("-", "_") in values:
            raise BitlowerError(f"{what}: {noun} {name!r} is given twice")
        values[name.replace("-", "_")] = _coerce_named(f"{what}: {noun} {name!r}", kinds[name], value)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not has_default and field.name not in values:
            raise BitlowerError(f"{what} needs the {noun} {kebab(field.name)!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError, AssertionError) as error:
        raise BitlowerError(f"{what}: {error}") from error


def _coerce_named(what: str, kind: Any, value: Any) -> Any:
    try:
        return coerce(kind, value)
    except MismatchError as error:
        hint = error.hint
        if isinstance(value, bool | int | float) and str in (kind, *typing.get_args(kind)):
            hint = f'quote it: "{value}"'
        raise BitlowerError(f"{what} {error}", hint=hint) from None
    except BitlowerError as error:
        raise BitlowerError(f"{what}: {error.message}", hint=error.hint) from None


def _tuple_member(kind: Any) -> Any:
    """``kind`` itself, or the tuple among the members of a union."""
    kind, _ = split_bounds(kind)
    members = [split_bounds(member)[0] for member in (typing.get_args(kind) if is_union(kind) else (kind,))]
    return next((m for m in members if typing.get_origin(m) is tuple), kind)


def changed_fields(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    values = {}
    for f in dataclasses.fields(instance):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if default is dataclasses.MISSING or getattr(instance, f.name) != default:
            values[f.name] = getattr(instance, f.name)
    return values
