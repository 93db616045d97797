"""The types that parameters of passes and losses may have, their bounds, and both in words.

A bound stands in the annotation, in the terms of the library ``annotated-types``: ``Annotated[float, Interval(gt=0,
le=1)]``, ``Annotated[int, Ge(1)] | None``, ``Annotated[tuple[str, ...], MinLen(1)]``. It is checked when a recipe is
read and when a pass is made in Python. It is part of the JSON schema of recipes, and ``passes show`` prints it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen

from bitlower.ir.diagnostics import BitlowerError

Bound = Gt | Ge | Lt | Le | MinLen | MaxLen


@dataclass(frozen=True)
class _Term:
    """What a bound means: whether a value keeps it, and how JSON schema calls it."""

    field: str
    holds: Callable[[Any, Any], bool]
    schema: str


_TERMS: dict[type[Any], _Term] = {
    Gt: _Term("gt", operator.gt, "exclusiveMinimum"),
    Ge: _Term("ge", operator.ge, "minimum"),
    Lt: _Term("lt", operator.lt, "exclusiveMaximum"),
    Le: _Term("le", operator.le, "maximum"),
    MinLen: _Term("min_length", lambda value, least: len(value) >= least, "minItems"),
    MaxLen: _Term("max_length", lambda value, most: len(value) <= most, "maxItems"),
}


def parameter_types(cls: type[Any]) -> dict[str, Any]:
    """The annotation of each parameter with its bounds, by its name in kebab-case.

    Raises:
        NameError: an annotation names what its module does not hold.
    """
    return _parameter_types(cls)  # type: ignore[arg-type]  # the hash of a class is that of its metaclass


@functools.cache
def _parameter_types(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {kebab(field.name): hints[field.name] for field in dataclasses.fields(cls)}


def kebab(name: str) -> str:
    """``group_size`` → ``group-size``."""
    return name.replace("_", "-")


def supported(kind: Any) -> bool:
    """Whether a parameter may be annotated with ``kind``."""
    kind, metadata = _split(kind)
    arguments = typing.get_args(kind)
    if not all(isinstance(item, GroupedMetadata | Bound) for item in metadata):
        return False
    if is_union(kind):
        return all(map(supported, arguments))
    if typing.get_origin(kind) is tuple:
        return all(a is Ellipsis or supported(a) for a in arguments)
    if typing.get_origin(kind) is typing.Literal:
        return all(isinstance(a, bool | int | str) for a in arguments)
    return kind in (bool, int, float, str, type(None)) or is_enum(kind) or is_structured(kind)


def describe_type(kind: Any) -> str:
    """What a parameter of type ``kind`` takes, in words."""
    kind, bounds = split_bounds(kind)
    return f"{_describe_unbounded(kind)}{describe_bounds(bounds)}"


def split_bounds(kind: Any) -> tuple[Any, list[Bound]]:
    """A type without its bounds, and these."""
    inner, metadata = _split(kind)
    return inner, list(_bounds(metadata))


def keeps(bounds: Sequence[Bound], value: Any) -> bool:
    """Whether ``value`` lies within ``bounds``."""
    return all(_TERMS[type(bound)].holds(value, _end(bound)) for bound in bounds)


def schema_bounds(bounds: Sequence[Bound]) -> dict[str, Any]:
    """``bounds`` in the words of JSON schema."""
    return {_TERMS[type(bound)].schema: _end(bound) for bound in bounds}


def describe_bounds(bounds: Sequence[Bound]) -> str:
    """``bounds`` in words, to follow a type: `` from 0 to 1``, `` of 1 or more``, `` above 0``."""
    ends = {type(bound): _end(bound) for bound in bounds}
    low = next(((ends[kind], mark) for kind, mark in ((Gt, "above "), (Ge, "")) if kind in ends), None)
    high = next(((ends[kind], mark) for kind, mark in ((Lt, "below "), (Le, "")) if kind in ends), None)
    words = ""
    if low and high:
        words = f" from {low[1]}{low[0]} to {high[1]}{high[0]}"
    elif low:
        words = f" above {low[0]}" if low[1] else f" of {low[0]} or more"
    elif high:
        words = f" below {high[0]}" if high[1] else f" of {high[0]} or less"
    lengths = [
        f" of {ends[kind]} items or {more}" for kind, more in ((MinLen, "more"), (MaxLen, "fewer")) if kind in ends
    ]
    return words + "".join(lengths)


def check_bounds(owner: Any, what: str) -> None:
    """Hold the fields of ``owner``, a dataclass called ``what``, to their choices and bounds.

    Raises:
        BitlowerError: one lies outside.
    """
    for name, kind in parameter_types(type(owner)).items():
        value = getattr(owner, name.replace("-", "_"))
        if not _within(kind, value):
            raise BitlowerError(f"{what}: {name} is {value}", hint=f"it takes {describe_type(kind)}")


def is_union(kind: Any) -> bool:
    """Whether ``kind`` is ``A | B``."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def is_enum(kind: Any) -> bool:
    """Whether ``kind`` is a class of an enum."""
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def is_structured(kind: Any) -> bool:
    """Whether ``kind`` is a class that can be made from plain data."""
    plain_type = kind in (bool, int, float, str) or is_enum(kind)
    made = any(hasattr(kind, method) for method in ("parse", "from_dict", "from_list"))
    return isinstance(kind, type) and not plain_type and made


def _describe_unbounded(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if is_union(kind):
        return " or ".join(map(describe_type, arguments))
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {describe_type(arguments[0])}"
        return f"list of {len(arguments)} ({', '.join(map(describe_type, arguments))})"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if is_enum(kind):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if hasattr(kind, "from_list"):
        return f"list of {kind.__name__.lower()}"
    return "none" if kind is type(None) else str(kind.__name__)


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(kind) is not typing.Annotated:
        return kind, ()
    inner, *metadata = typing.get_args(kind)
    return inner, tuple(metadata)


def _bounds(metadata: Sequence[Any]) -> Iterator[Bound]:
    for item in metadata:
        if isinstance(item, GroupedMetadata):
            yield from _bounds(list(item))
        else:
            yield item


def _end(bound: Bound) -> Any:
    return getattr(bound, _TERMS[type(bound)].field)


def _within(kind: Any, value: Any) -> bool:
    """Whether ``value`` keeps the choices and bounds in ``kind``; those of a union hold for values of their types."""
    kind, bounds = split_bounds(kind)
    arguments = typing.get_args(kind)
    if is_union(kind):
        bounded = [split_bounds(member) for member in arguments]
        meant = [member for member, (inner, _) in zip(arguments, bounded, strict=True) if _is_of(inner, value)]
        return not meant or any(_within(member, value) for member in meant)
    if typing.get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return keeps(bounds, value) and all(map(_within, kinds, value))
    if typing.get_origin(kind) is typing.Literal:
        return value in arguments
    if kind in (int, float) and isinstance(value, bool):
        return False
    return not bounds or keeps(bounds, value)


def _is_of(kind: Any, value: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    return isinstance(kind, type) and isinstance(value, (kind, int) if kind is float else kind)
