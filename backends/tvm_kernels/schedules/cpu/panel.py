"""What panels of a weight have in common: prefetches, scales, and the end of their sums."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.vectors import LANES, local, prefetch, put, ramp
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import PANEL
from bitlower.backends.tvm_kernels.tir.epilogue import write
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when

COLUMNS = PANEL // LANES
"""Vectors across a panel."""


def store(spec: LinearSpec, buffers: Buffers, panel: Expr, row: Expr, column: int, y: Expr) -> None:
    """Finish the 16 sums ``y`` of vector ``column`` of a panel, and write those that are outputs."""
    start = panel * i64(PANEL) + i64(column * LANES)

    def ragged() -> None:
        [vector] = vectors = local(1, "float32")
        put(vectors, 0, y)
        with T.serial(i64(0), i64(spec.n % LANES)) as lane:
            write(spec, buffers, row, start + lane, vector[lane])

    if spec.n % PANEL == 0:
        write(spec, buffers, row, ramp(start), y)
        return
    edge = i64(spec.n // LANES * LANES)
    last = (lambda: when(start.equal(edge), ragged)) if spec.n % LANES else None
    when(start < edge, lambda: write(spec, buffers, row, ramp(start), y), last)


def scales(spec: LinearSpec, buffers: Buffers, name: str, panel: Expr, group: Expr, column: int) -> Any:
    """16 entries of ``weight_scale`` or ``weight_zero`` of a group."""
    return buffers[name][panel, group, ramp(i64(column * LANES))]


def prefetch_words(spec: LinearSpec, buffers: Buffers, panel: Expr, step: Expr, ahead: int) -> None:
    """Prefetch, while a single row reads a step of a panel, the words ``ahead`` bytes later.

    Panels follow each other in memory, so that this goes on into the next.
    """
    for word in range(spec.step * spec.bits // 32):
        for column in range(COLUMNS):
            prefetch(buffers["weight"], [panel, step + _later(spec, spec.step, ahead), i64(word), i64(column * LANES)])


def prefetch_scales(spec: LinearSpec, buffers: Buffers, panel: Expr, group: Expr, ahead: int) -> None:
    """The same of the scales and zero points of a group."""
    later = group + _later(spec, spec.group_size, ahead)
    for column in range(COLUMNS):
        prefetch(buffers["weight_scale"], [panel, later, i64(column * LANES)])
    if spec.has_zeros:
        prefetch(buffers["weight_zero"], [panel, later, i64(0)])


def _later(spec: LinearSpec, each: int, ahead: int) -> Any:
    """How many entries, of ``each`` inputs, cover ``ahead`` bytes of codes."""
    return i64(max(1, ahead * 8 // (PANEL * spec.bits) // each))
