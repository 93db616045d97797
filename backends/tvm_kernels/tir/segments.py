"""Runs of inputs with one scale on either side, as kernels go over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import i64


@dataclass(frozen=True)
class Segment:
    """A run of inputs with one scale on either side.

    Args:
        start: its first input.
        size: how many.
        group: of the weight.
    """

    start: Expr
    size: int
    group: Expr


def runs(spec: LinearSpec, part: int) -> list[tuple[Segment, int]]:
    """The segments of an activation group: one of them, and how many like it follow each other."""
    starts = [0, *accumulate(spec.x_group_sizes)]
    begin, end = starts[part], starts[part + 1]
    if spec.grouped and begin % spec.group_size == end % spec.group_size == 0:
        return [(Segment(i64(begin), spec.group_size, i64(begin // spec.group_size)), (end - begin) // spec.group_size)]
    edges = [edge for edge in (0, *accumulate(spec.segment_sizes)) if begin <= edge <= end]
    return [(Segment(i64(a), b - a, i64(a // spec.group_size)), 1) for a, b in pairwise(edges)]


def repeat(times: int, first: Segment, body: Callable[[Segment], None]) -> None:
    """Emit ``body`` for a segment and those like it."""
    if times == 1:
        body(first)
        return
    with T.serial(i64(0), i64(times)) as turn:
        body(Segment(first.start + turn * i64(first.size), first.size, first.group + turn))


def over_parts(spec: LinearSpec, body: Callable[[Expr, list[tuple[Segment, int]]], None]) -> None:
    """Emit ``body(activation group, its runs)`` for all of them: in a loop where they are alike."""
    sizes = spec.x_group_sizes
    if len(sizes) > 1 and len(set(sizes)) == 1 and (not spec.grouped or sizes[0] % spec.group_size == 0):
        size = sizes[0]
        each, groups = (spec.group_size, size // spec.group_size) if spec.grouped else (size, 0)
        with T.serial(i64(0), i64(len(sizes))) as part:
            first = Segment(part * i64(size), each, part * i64(groups))
            body(part, [(first, size // each)])
        return
    for at in range(len(sizes)):
        body(i64(at), runs(spec, at))
