"""One panel of a linear with float activations: few rows straight from the codes, many from unpacked float weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.panel import COLUMNS, prefetch_scales, prefetch_words, scales, store
from bitlower.backends.tvm_kernels.schedules.cpu.rowwise import VectorLanes, VectorReduction
from bitlower.backends.tvm_kernels.schedules.cpu.unpack import float_codes
from bitlower.backends.tvm_kernels.schedules.cpu.vectors import fill, get, local, over_rows, put, ramp, splat
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import PANEL
from bitlower.backends.tvm_kernels.tir.expressions import Expr, with_lanes
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when

_BLOCK = 128
"""The most inputs that are unpacked at a time: 32 KiB of float32 a panel, which the first-level cache holds."""


def row_sums(spec: LinearSpec, buffers: Buffers, m: Any, many_rows: int) -> Any:
    """The sum of ``x`` over each group of inputs, float32 [M, groups], for the share of zero points.

    Emitted once before all panels, for fewer rows than ``many_rows``.
    """
    groups = spec.k // spec.group_size
    sums = T.alloc_buffer((many_rows, groups), "float32")

    def emit() -> None:
        with T.serial(i64(0), m) as row, T.serial(i64(0), i64(groups)) as group:
            total = VectorReduction(lambda a, b: a + b, 0.0)

            def add(at: Expr) -> None:
                x = buffers["x"][row, group * i64(spec.group_size) + at]
                total.add(x.astype(with_lanes("float32", x)))

            VectorLanes().over(spec.group_size, add)
            T.buffer_store(sums, total.result(), [row, group])

    when(m < i64(many_rows), emit)
    return sums


class FloatPanel:
    """Emits the sums of one panel for all rows.

    Args:
        spec: the linear.
        buffers: its arguments, and ``row_sums`` if the weight has zero points.
        m: how many there are.
        panel: which of the panels.
        tiles: how many rows go together, ascending from 1.
        unpack: whether the weights are unpacked to scratch memory first.
        ahead: how many bytes ahead memory is asked for codes; 0: never.
    """

    def __init__(
        self, spec: LinearSpec, buffers: Buffers, m: Any, panel: Expr, tiles: Sequence[int], *, unpack: bool,
        ahead: int,
    ) -> None:  # fmt: skip
        self.spec, self.buffers, self.m, self.panel = spec, buffers, m, panel
        self.tiles, self.unpack = tiles, unpack
        self.block = block_size(spec)
        self.ahead = ahead if spec.weight is not None else 0

    def emit(self) -> None:
        """The whole panel."""
        if self.unpack:
            self._emit_unpacked()
        else:
            over_rows(self.m, self.tiles, self._packed_tile)

    def _packed_tile(self, tile: int, row: Expr) -> None:
        """Sums of codes within each group; scale and zero point come after them. Float weights have neither."""
        if self.spec.weight is None:
            sums = self._group(tile, row, i64(0))
            self._store(tile, row, lambda at: get(sums, at))
            return
        total = local(tile * COLUMNS, "float32")
        fill(total, "float32")
        with T.serial(i64(0), i64(self.spec.k // self.spec.group_size)) as group:
            if self.ahead:
                prefetch_scales(self.spec, self.buffers, self.panel, group, self.ahead)
            sums = self._group(tile, row, group)
            for column in range(COLUMNS):
                scale = self._scales(group, column)
                for line in range(tile):
                    at = line * COLUMNS + column
                    part = get(sums, at) - self._zero_share(row + i64(line), group, column)
                    put(total, at, get(total, at) + part * scale)
        self._store(tile, row, lambda at: get(total, at))

    def _group(self, tile: int, row: Expr, group: Expr) -> Any:
        """Σ x·u over a group, a vector for each row and column; two chains of sums where there is one row."""
        spec, count = self.spec, tile * COLUMNS
        chains = 2 if tile == 1 else 1
        sums = local(count * chains, "float32")
        fill(sums, "float32")
        with T.serial(i64(0), i64(spec.group_size // spec.step)) as offset:
            at = group * i64(spec.group_size // spec.step) + offset
            if self.ahead:
                prefetch_words(spec, self.buffers, self.panel, at, self.ahead)
            words = [self._words(at, column) for column in range(COLUMNS)]
            for turn in range(spec.step):
                codes = [
                    words[column][0].astype("float32x16")
                    if spec.weight is None
                    else T.Bind(float_codes(spec, words[column], turn))
                    for column in range(COLUMNS)
                ]
                for line in range(tile):
                    x = self._x(row + i64(line), at * i64(spec.step) + i64(turn))
                    for column in range(COLUMNS):
                        place = turn % chains * count + line * COLUMNS + column
                        put(sums, place, get(sums, place) + x * codes[column])
        for place in range(count * (chains - 1)):
            put(sums, place, get(sums, place) + get(sums, place + count))
        return sums

    def _zero_share(self, row: Expr, group: Expr, column: int) -> Any:
        if not self.spec.has_zeros:
            return splat(tirx.const(0.0, "float32"))
        return self._zeros(group, column) * splat(self.buffers["row_sums"][row, group])

    def _zeros(self, group: Expr, column: int) -> Any:
        """Zero points of the stored codes, float32x16; of 8-bit codes less the 128 that these are stored without."""
        zeros = scales(self.spec, self.buffers, "weight_zero", self.panel, group, column).astype("float32x16")
        return zeros - splat(tirx.const(128.0 if self.spec.bits == 8 else 0.0, "float32"))

    def _x(self, row: Expr, k: Expr) -> Any:
        return T.Bind(splat(self.buffers["x"][row, k].astype("float32")))

    def _scales(self, group: Expr, column: int) -> Any:
        return T.Bind(scales(self.spec, self.buffers, "weight_scale", self.panel, group, column))

    def _words(self, at: Expr, column: int) -> list[Any]:
        count = 1 if self.spec.weight is None else self.spec.step * self.spec.bits // 32
        index = ramp(i64(column * 16))
        return [T.Bind(self.buffers["weight"][self.panel, at, i64(word), index]) for word in range(count)]

    def _emit_unpacked(self) -> None:
        """Blocks of inputs, each unpacked once; sums of all rows wait in scratch memory between blocks."""
        weights = T.alloc_buffer((self.block, PANEL), "float32")
        sums = T.alloc_buffer((self.m, PANEL), "float32")
        with T.serial(i64(0), i64(self.spec.k // self.block)) as block:
            self._unpack(block, weights)
            over_rows(self.m, self.tiles, lambda tile, row: self._add_block(tile, row, block, weights, sums))
        over_rows(self.m, [1], lambda tile, row: self._store(tile, row, lambda at: _vector(sums, row, at)))

    def _unpack(self, block: Expr, weights: Any) -> None:
        """Dequantize the weights of a block."""
        run = min(self.block, self.spec.group_size)
        with T.serial(i64(0), i64(self.block // run)) as part:
            start = block * i64(self.block) + part * i64(run)
            group = start // i64(self.spec.group_size)
            scale = [self._scales(group, column) for column in range(COLUMNS)]
            zero = [T.Bind(self._zeros(group, column)) for column in range(COLUMNS)] if self.spec.has_zeros else []
            with T.serial(i64(0), i64(run // self.spec.step)) as step:
                at = start // i64(self.spec.step) + step
                words = [self._words(at, column) for column in range(COLUMNS)]
                for turn in range(self.spec.step):
                    place = part * i64(run) + step * i64(self.spec.step) + i64(turn)
                    for column in range(COLUMNS):
                        code = float_codes(self.spec, words[column], turn)
                        value = (code - zero[column] if zero else code) * scale[column]
                        T.buffer_store(weights, value, [place, ramp(i64(column * 16))])

    def _add_block(self, tile: int, row: Expr, block: Expr, weights: Any, sums: Any) -> None:
        block_sums = local(tile * COLUMNS, "float32")
        places = [(line, column) for line in range(tile) for column in range(COLUMNS)]
        fill(block_sums, "float32")

        def load() -> None:
            for at, (line, column) in enumerate(places):
                put(block_sums, at, _vector(sums, row + i64(line), column))

        when(block > i64(0), load)
        with T.serial(i64(0), i64(self.block)) as k:
            vectors = [T.Bind(_vector(weights, k, column)) for column in range(COLUMNS)]
            for line in range(tile):
                x = self._x(row + i64(line), block * i64(self.block) + k)
                for column in range(COLUMNS):
                    at = line * COLUMNS + column
                    put(block_sums, at, get(block_sums, at) + x * vectors[column])
        for at, (line, column) in enumerate(places):
            T.buffer_store(sums, get(block_sums, at), [row + i64(line), ramp(i64(column * 16))])

    def _store(self, tile: int, row: Expr, vector: Any) -> None:
        for line in range(tile):
            for column in range(COLUMNS):
                store(self.spec, self.buffers, self.panel, row + i64(line), column, vector(line * COLUMNS + column))


def _vector(buffer: Any, row: Expr, column: int) -> Any:
    return buffer[row, ramp(i64(column * 16))]


def block_size(spec: LinearSpec) -> int:
    """How many inputs are unpacked at a time: they lie in one group, or are whole groups."""
    sizes = range(spec.step, min(_BLOCK, spec.k) + 1, spec.step)
    fits = [n for n in sizes if spec.k % n == 0 and (spec.group_size % n == 0 or n % spec.group_size == 0)]
    return fits[-1]
