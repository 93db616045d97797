"""Names for the sizes that torch found to vary, and which of them a model takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from bitlower.ir import BitlowerError, Length
from bitlower.ir.tokens import BATCH, SEQUENCE

_ASSUMED = 2
"""The lower bound that torch sets for every size; only a larger one was found in the model."""
_UNBOUNDED = 1 << 31
"""Bounds beyond are those that torch writes where there is none."""
Layout = Mapping[str, Sequence[int | str]]
"""Names of inputs, in order, and of their dimensions."""


def symbol_names(graph: fx.Graph, layout: Layout | None) -> dict[str, str]:
    """Torch's symbols by name: sizes that it found equal have one symbol, and so one name.

    Args:
        graph: with torch's own types on the placeholders.
        layout: says what each dimension is; None: a size that one input has twice is ``sequence`` (a mask of
            ``[sequence, sequence]``), then the first axis is ``batch`` and the second ``sequence``, as far as the
            names are free, and others are called after the input and the axis.

    Raises:
        BitlowerError: a dimension that should vary came out fixed.
    """
    shapes = [(str(node.target), node.meta["val"].shape) for node in graph.find_nodes(op="placeholder")]
    if layout is None:
        return _found_names(shapes)
    names: dict[str, str] = {}
    for (_, shape), (name, dims) in zip(shapes, layout.items(), strict=True):
        for size, dim in zip(shape, dims, strict=True):
            if isinstance(dim, str):
                if not _varies(size):
                    raise BitlowerError(
                        f"the model computes with a fixed size of {int(size)} in the dimension {dim!r} of {name!r}",
                        hint="it can only be traced for that one size: give `example_inputs` of the size to run",
                    )
                names.setdefault(str(size), dim)
    return names


def _found_names(shapes: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, str]:
    symbols = [(name, [str(s) if _varies(s) else "" for s in shape]) for name, shape in shapes]
    names: dict[str, str] = {}
    for _, sizes in symbols:
        twice = next((size for size in sizes if size and sizes.count(size) > 1), None)
        if twice:
            names[twice] = SEQUENCE
            break
    for name, sizes in symbols:
        for axis, size in enumerate(sizes):
            if not size or size in names:
                continue
            swapped = axis == 1 and names.get(sizes[0]) == SEQUENCE
            wanted = BATCH if axis == 0 or swapped else SEQUENCE if axis == 1 else ""
            free = bool(wanted) and wanted not in names.values()
            names[size] = wanted if free else f"{name}_{axis}"
    return names


def named(size: int | torch.SymInt, names: Mapping[str, str]) -> int | str:
    """A size with its symbols by name; sums of names alone are sorted."""
    if not _varies(size):
        return int(size)
    text = re.sub(r"[a-z]+\d+", lambda match: names.get(match[0], match[0]), str(size))
    terms = text.split(" + ")
    if set(terms) <= set(names.values()):
        text = " + ".join(sorted(terms))
    return text


def _varies(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and not str(size).isdigit()


def found_lengths(exported: ExportedProgram, names: Mapping[str, str]) -> dict[str, Length]:
    """The sizes that the trace holds for, by the dimension's name: bounds that torch found, and multiples."""
    equalities = _equalities(exported)
    lengths: dict[str, Length] = {}
    for symbol, bounds in exported.range_constraints.items():
        name = names.get(str(symbol))
        if name is None:
            continue
        lower, upper = _number(bounds.lower), _number(bounds.upper)
        length = Length(lower if lower is not None and lower > _ASSUMED else 1, upper)
        traced = equalities.sizes.get(symbol)
        if traced is not None:
            step = equalities.step(symbol, traced, upper)
            length = Length(length.minimum, upper, step) if step else Length(traced, traced)
        lengths[name] = _both(lengths[name], length) if name in lengths else length
    return {name: length for name, length in sorted(lengths.items()) if length != Length()}


def _number(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and abs(int(bound)) < _UNBOUNDED else None


def _both(a: Length, b: Length) -> Length:
    limits = [n for n in (a.maximum, b.maximum) if n is not None]
    return Length(max(a.minimum, b.minimum), min(limits, default=None), lcm(a.multiple, b.multiple))


@dataclass(frozen=True)
class _Equalities:
    """What torch had to take for equal while it traced, and the sizes that it traced with, by symbol."""

    expressions: tuple[Any, ...]
    sizes: Mapping[Any, int]

    def step(self, symbol: Any, traced: int, upper: int | None) -> int | None:
        """The least step from the traced size at which all of it stays equal; None: it holds for that size alone."""
        about = [e for e in self.expressions if symbol in e.free_symbols and e.free_symbols <= set(self.sizes)]
        for step in (n for n in range(1, traced + 1) if traced % n == 0):
            others = [n for n in (traced + step, traced + 2 * step, traced - step) if n > 0 and (upper or n) >= n]
            if all(self._holds(e, symbol, size) for size in others for e in about):
                return step if others else 1
        return None

    def _holds(self, expression: Any, symbol: Any, size: int) -> bool:
        return bool(expression.xreplace({**self.sizes, symbol: size}) == True)  # noqa: E712 - sympy's own truth


def _equalities(exported: ExportedProgram) -> _Equalities:
    sizes = [size for node in exported.graph.find_nodes(op="placeholder") for size in _shape(node)]
    environment = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if environment is None:
        return _Equalities((), {})
    equal = [environment.simplify(guard.expr) for guard in environment.guards if guard.expr.is_Equality]
    return _Equalities(tuple(equal), {symbol: int(value) for symbol, value in environment.backed_var_to_val.items()})


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()
