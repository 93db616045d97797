"""One panel of a linear with integer activations: sums of four products of bytes, float32 between segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.panel import COLUMNS, prefetch_scales, prefetch_words, scales, store
from bitlower.backends.tvm_kernels.schedules.cpu.unpack import centred_bytes, zero_bytes
from bitlower.backends.tvm_kernels.schedules.cpu.vectors import dot, fill, get, local, over_rows, put, ramp, splat
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import PANEL
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64
from bitlower.backends.tvm_kernels.tir.segments import Segment, over_parts, repeat

_QUADS = 4
"""Inputs that one word holds."""


class IntegerPanel:
    """Emits the sums of one panel for all rows.

    Args:
        spec: the linear.
        buffers: its arguments.
        m: how many there are.
        panel: which of the panels.
        tiles: how many rows go together, ascending from 1.
        unpack: whether the weights are unpacked to scratch memory first.
        ahead: how many bytes ahead memory is asked for codes of fewer than 8 bits; 0: never.
    """

    def __init__(
        self, spec: LinearSpec, buffers: Buffers, m: Any, panel: Expr, tiles: Sequence[int], *, unpack: bool,
        ahead: int,
    ) -> None:  # fmt: skip
        self.spec, self.buffers, self.m, self.panel = spec, buffers, m, panel
        self.tiles, self.unpack = tiles, unpack
        self.unpacked: Any = None
        self.ahead = ahead if spec.bits < 8 else 0

    def emit(self) -> None:
        """The whole panel."""
        if self.unpack:
            self.unpacked = T.alloc_buffer((self.spec.k // _QUADS, PANEL), "int32")
            over_parts(self.spec, lambda part, segments: self._unpack_runs(segments))
        over_rows(self.m, self.tiles, self.tile)

    def _unpack_runs(self, segments: list[tuple[Segment, int]]) -> None:
        for segment, times in segments:
            repeat(times, segment, self._unpack)

    def _unpack(self, segment: Segment) -> None:
        zeros = [self._zeros(segment.group, column) for column in range(COLUMNS)]
        with T.serial(i64(0), i64(segment.size // self.spec.step)) as step:
            at = segment.start // i64(self.spec.step) + step
            for column in range(COLUMNS):
                for turn, word in enumerate(self._packed_words(at, column, zeros[column])):
                    quad = at * i64(self.spec.step // _QUADS) + i64(turn)
                    T.buffer_store(self.unpacked, word, [quad, ramp(i64(column * 16))])

    def tile(self, tile: int, row: Expr) -> None:
        """The results of ``tile`` rows from ``row`` on."""
        total = local(tile * COLUMNS, "float32")
        fill(total, "float32")
        over_parts(self.spec, lambda part, segments: self._activation_group(tile, row, part, segments, total))
        for line in range(tile):
            for column in range(COLUMNS):
                store(self.spec, self.buffers, self.panel, row + i64(line), column, get(total, line * COLUMNS + column))

    def _activation_group(
        self, tile: int, row: Expr, part: Expr, segments: list[tuple[Segment, int]], total: Any
    ) -> None:
        """Add what one group of inputs with one activation scale returns."""
        sums = local(tile * COLUMNS, "float32" if self.spec.grouped else "int32")
        if self.spec.grouped:
            fill(sums, "float32")
            for segment, times in segments:
                repeat(times, segment, lambda s: self._add_segment(s, tile, row, sums))
        else:
            [(segment, _)] = segments
            self._sum(segment, tile, row, sums)
        for line in range(tile):
            for column in range(COLUMNS):
                at = line * COLUMNS + column
                put(total, at, get(total, at) + self._scaled(part, row + i64(line), column, get(sums, at)))

    def _scaled(self, part: Expr, row: Expr, column: int, sums: Expr) -> Any:
        spec, buffers = self.spec, self.buffers
        token = spec.x_quant is not None and spec.x_quant.granularity.dynamic
        at = row if token else part
        scale, zero = buffers["x_scale"][at], buffers["x_zero"][at]
        shares = buffers["weight_sum"][part, ramp(self.panel * i64(PANEL) + i64(column * 16))]
        if spec.grouped:
            return (sums - splat(zero + self._shift("float32")) * shares) * splat(scale)
        exact = sums - splat(zero.astype("int32") + self._shift("int32")) * shares
        return (
            exact.astype("float32x16")
            * scales(spec, buffers, "weight_scale", self.panel, i64(0), column)
            * splat(scale)
        )

    def _shift(self, dtype: str) -> Any:
        """What signed activations are shifted by, to be unsigned bytes."""
        signed = self.spec.x_quant is not None and self.spec.x_quant.grid.signed
        return tirx.const(128 if signed else 0, dtype)

    def _add_segment(self, segment: Segment, tile: int, row: Expr, total: Any) -> None:
        sums = local(tile * COLUMNS, "int32")
        if self.ahead:
            prefetch_scales(self.spec, self.buffers, self.panel, segment.group, self.ahead)
        self._sum(segment, tile, row, sums)
        for column in range(COLUMNS):
            scale = T.Bind(scales(self.spec, self.buffers, "weight_scale", self.panel, segment.group, column))
            for line in range(tile):
                at = line * COLUMNS + column
                put(total, at, get(total, at) + get(sums, at).astype("float32x16") * scale)

    def _sum(self, segment: Segment, tile: int, row: Expr, sums: Any) -> None:
        """Integer sums of a segment; in two chains where a single row would wait for each sum."""
        step = self.spec.step if self.unpacked is None else _QUADS
        count, turns = tile * COLUMNS, step // _QUADS
        chains = 2 if tile == 1 and turns > 1 else 1
        chained = sums if chains == 1 else local(count * chains, "int32")
        fill(chained, "int32")
        zeros = [self._zeros(segment.group, column) for column in range(COLUMNS)] if self.unpacked is None else []
        # With the number of rows in it, which is 1, LLVM does not unroll the loop and bring all it asks for together.
        times = i64(segment.size // step) * (self.m if self.ahead else i64(1))
        with T.serial(i64(0), times) as offset:
            at = segment.start // i64(step) + offset
            if self.ahead:
                prefetch_words(self.spec, self.buffers, self.panel, at, self.ahead)
            words = self._step_words(at, zeros)
            for turn in range(turns):
                for line in range(tile):
                    quad = splat(self._quad(row + i64(line), at * i64(step) + i64(turn * _QUADS)))
                    for column in range(COLUMNS):
                        place = turn % chains * count + line * COLUMNS + column
                        put(chained, place, dot(self.spec.target, get(chained, place), quad, words[column][turn]))
        if chains > 1:
            for place in range(count):
                put(sums, place, get(chained, place) + get(chained, place + count))

    def _step_words(self, at: Expr, zeros: list[Any]) -> list[list[Any]]:
        """The weight's words of a step, for each column of vectors those of each four inputs."""
        if self.unpacked is not None:
            return [[T.Bind(self.unpacked[at, ramp(i64(column * 16))])] for column in range(COLUMNS)]
        return [self._packed_words(at, column, zeros[column]) for column in range(COLUMNS)]

    def _quad(self, row: Expr, start: Expr) -> Any:
        """Four activations as one word of unsigned bytes."""
        x = self.buffers["x"]
        word = tirx.reinterpret("int32", x[row, tirx.Ramp(start, i64(1), 4)])
        signed = self.spec.x_quant is not None and self.spec.x_quant.grid.signed
        return T.Bind(word ^ tirx.const(-0x7F7F7F80, "int32") if signed else word)

    def _zeros(self, group: Expr, column: int) -> Any:
        zero = (
            scales(self.spec, self.buffers, "weight_zero", self.panel, group, column) if self.spec.has_zeros else None
        )
        return zero_bytes(self.spec, zero)

    def _packed_words(self, at: Expr, column: int, zero: Any) -> list[Any]:
        """The centred codes of a step as signed bytes, a word for each four inputs."""
        count = self.spec.step * self.spec.bits // 32
        index = ramp(i64(column * 16))
        words = [T.Bind(self.buffers["weight"][self.panel, at, i64(word), index]) for word in range(count)]
        return [T.Bind(word) for word in centred_bytes(self.spec, words, zero)]
