"""Linears on the CPU over weights in panels: the walk over panels and rows, and the epilogue.

Each panel of 64 outputs is one task of TVM's thread pool. Within it rows go in register tiles (the buckets below the
last); a single row has tasks of its own, for beside larger tiles the compiler makes it slow. From ``buckets[-1]`` rows
on, codes of fewer than 8 bits, and all codes beside float activations, are unfolded once a panel into scratch memory;
below that they are unfolded in registers as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels._cpu_frame import LANES, local, prefetch, put, ramp
from bitlower.backends.tvm_kernels._expressions import Expr
from bitlower.backends.tvm_kernels._frame import Buffers, function, i64, when
from bitlower.backends.tvm_kernels._packing import PANEL, panels
from bitlower.backends.tvm_kernels._spec import LinearSpec
from bitlower.backends.tvm_kernels._write import write

COLUMNS = PANEL // LANES
"""Vectors across a panel."""
_AHEAD = 6144
"""Bytes of codes between those that one row reads and those that it asks memory for. To unfold a line takes so many
instructions that the processor by itself sees only a few lines ahead."""


def lower_linear(spec: LinearSpec) -> Any:
    """The scheduled PrimFunc of a linear whose weight lies in panels."""
    from bitlower.backends.tvm_kernels._cpu_float import FloatPanel, row_sums
    from bitlower.backends.tvm_kernels._cpu_integer import IntegerPanel

    kind = FloatPanel if spec.activation is None else IntegerPanel

    def body(buffers: Buffers, rows: Any) -> None:
        if spec.activation is None and spec.has_zeros:
            buffers["row_sums"] = row_sums(spec, buffers, rows)

        def over_panels(tiles: Sequence[int], *, unfold: bool = False, single: bool = False) -> None:
            with T.parallel(i64(0), i64(panels(spec))) as panel:
                kind(spec, buffers, rows, panel, tiles, unfold=unfold, single=single).emit()

        def several() -> None:
            if spec.weight is None or (spec.activation is not None and spec.width == 8):
                over_panels(spec.buckets[:-1])
                return
            few = rows < i64(spec.buckets[-1])
            when(few, lambda: over_panels(spec.buckets[:-1]), lambda: over_panels(spec.buckets[:-1], unfold=True))

        when(rows.equal(i64(1)), lambda: over_panels((1,), single=True), several)

    return function(spec, body)


def store(spec: LinearSpec, buffers: Buffers, panel: Expr, row: Expr, column: int, y: Expr) -> None:
    """Finish the 16 sums ``y`` of vector ``column`` of a panel, and write those that are outputs."""
    start = panel * i64(PANEL) + i64(column * LANES)

    def ragged() -> None:
        [held] = vectors = local(1, "float32")
        put(vectors, 0, y)
        with T.serial(i64(0), i64(spec.outputs % LANES)) as lane:
            write(spec, buffers, row, start + lane, held[lane])

    if spec.outputs % PANEL == 0:
        write(spec, buffers, row, ramp(start), y)
        return
    edge = i64(spec.outputs // LANES * LANES)
    last = (lambda: when(start.equal(edge), ragged)) if spec.outputs % LANES else None
    when(start < edge, lambda: write(spec, buffers, row, ramp(start), y), last)


def scales(spec: LinearSpec, buffers: Buffers, name: str, panel: Expr, group: Expr, column: int) -> Any:
    """16 entries of ``weight_scale`` or ``weight_zero`` of a group."""
    return buffers[name][panel, group, ramp(i64(column * LANES))]


def ask_words(spec: LinearSpec, buffers: Buffers, panel: Expr, step: Expr) -> None:
    """Prefetch, while a single row reads a step of a panel, the words :data:`_AHEAD` bytes later.

    Panels follow each other in memory, so that this goes on into the next.
    """
    for word in range(spec.step * spec.width // 32):
        for column in range(COLUMNS):
            prefetch(buffers["weight"], [panel, step + _later(spec, spec.step), i64(word), i64(column * LANES)])


def ask_scales(spec: LinearSpec, buffers: Buffers, panel: Expr, group: Expr) -> None:
    """The same of the scales and zero points of a group."""
    later = group + _later(spec, spec.group)
    for column in range(COLUMNS):
        prefetch(buffers["weight_scale"], [panel, later, i64(column * LANES)])
    if spec.has_zeros:
        prefetch(buffers["weight_zero"], [panel, later, i64(0)])


def _later(spec: LinearSpec, each: int) -> Any:
    """How many entries, of ``each`` inputs, cover :data:`_AHEAD` bytes of codes."""
    return i64(max(1, _AHEAD * 8 // (PANEL * spec.width) // each))
