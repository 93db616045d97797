"""Linears on the CPU over weights in panels: the walk over panels and rows, and the epilogue.

Each panel of 64 outputs is one task of TVM's thread pool. Within it rows go in register tiles (the buckets below the
last); a single row has tasks of its own, for beside larger tiles the compiler makes it slow. From ``buckets[-1]`` rows
on, codes of fewer than 8 bits, and all codes beside float activations, are unfolded once a panel into scratch memory;
below that they are unfolded in registers as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels._cpu_frame import LANES, ramp
from bitlower.backends.tvm_kernels._expressions import Expr
from bitlower.backends.tvm_kernels._frame import Buffers, function, i64, when
from bitlower.backends.tvm_kernels._packing import PANEL, panels
from bitlower.backends.tvm_kernels._spec import LinearSpec
from bitlower.backends.tvm_kernels._write import write

COLUMNS = PANEL // LANES
"""Vectors across a panel."""


def lower_linear(spec: LinearSpec) -> Any:
    """The scheduled PrimFunc of a linear whose weight lies in panels."""
    from bitlower.backends.tvm_kernels._cpu_float import FloatPanel, row_sums
    from bitlower.backends.tvm_kernels._cpu_integer import IntegerPanel

    kind = FloatPanel if spec.activation is None else IntegerPanel

    def body(buffers: Buffers, rows: Any) -> None:
        if spec.activation is None and spec.has_zeros:
            buffers["row_sums"] = row_sums(spec, buffers, rows)

        def over_panels(tiles: Sequence[int], unfold: bool) -> None:
            with T.parallel(i64(0), i64(panels(spec))) as panel:
                kind(spec, buffers, rows, panel, tiles, unfold).emit()

        def several() -> None:
            if spec.weight is None or (spec.activation is not None and spec.width == 8):
                over_panels(spec.buckets[:-1], False)
                return
            few = rows < i64(spec.buckets[-1])
            when(few, lambda: over_panels(spec.buckets[:-1], False), lambda: over_panels(spec.buckets[:-1], True))

        when(rows.equal(i64(1)), lambda: over_panels((1,), False), several)

    return function(spec, body)


def store(spec: LinearSpec, buffers: Buffers, panel: Expr, row: Expr, column: int, y: Expr) -> None:
    """Finish the 16 sums ``y`` of vector ``column`` of a panel, and write those that are outputs."""
    start = panel * i64(PANEL) + i64(column * LANES)

    def ragged() -> None:
        held = T.alloc_buffer((LANES,), "float32", scope="local")
        T.buffer_store(held, y, [ramp(tirx.const(0, "int32"))])
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
