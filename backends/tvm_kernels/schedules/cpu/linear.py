"""Linears on the CPU over weights in panels: the walk over panels and rows, and the epilogue.

Each panel of 64 outputs is one task of TVM's thread pool. Within it rows go in register tiles; a single row has tasks
of its own, for beside larger tiles the compiler makes it slow. From ``many_rows`` rows on, codes of fewer than 8 bits,
and all codes beside float activations, are unpacked once a panel into scratch memory; below that they are unpacked in
registers as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.panel_float import FloatPanel, row_sums
from bitlower.backends.tvm_kernels.schedules.cpu.panel_integer import IntegerPanel
from bitlower.backends.tvm_kernels.spec.base import kernel_name
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import panels
from bitlower.backends.tvm_kernels.spec.target import GemmConfig
from bitlower.backends.tvm_kernels.tir.function import Buffers, function, i64, when


def lower_linear(spec: LinearSpec, config: GemmConfig) -> Any:
    """The scheduled PrimFunc of a linear whose weight lies in panels."""
    kind = FloatPanel if spec.x_quant is None else IntegerPanel

    def body(buffers: Buffers, m: Any) -> None:
        if spec.x_quant is None and spec.has_zeros:
            buffers["row_sums"] = row_sums(spec, buffers, m, config.many_rows)

        def over_panels(tiles: Sequence[int], *, unpack: bool = False, ahead: int = 0) -> None:
            with T.parallel(i64(0), i64(panels(spec))) as panel:
                kind(spec, buffers, m, panel, tiles, unpack=unpack, ahead=ahead).emit()

        def several() -> None:
            if spec.weight is None or (spec.x_quant is not None and spec.bits == 8):
                over_panels(config.row_tiles)
                return
            few = m < i64(config.many_rows)
            when(few, lambda: over_panels(config.row_tiles), lambda: over_panels(config.row_tiles, unpack=True))

        when(m.equal(i64(1)), lambda: over_panels((1,), ahead=config.prefetch_bytes), several)

    return function(spec, body, kernel_name(spec, config))
