"""Tiles by the matrix instructions of NVIDIA GPUs: int8 with int32 sums, float16 with float32 sums, 16 x 16 x 16.

Warps share a tile: four of them one of 64 x 64 results, 32 x 32 each. Codes of fewer bits are unpacked (int8) or
dequantized (float16) as they are written to shared memory. The sums go through shared memory to the epilogue, for the
place of a sum within the registers of a warp is not documented.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import sync
from bitlower.backends.tvm_kernels.schedules.gpu.tile import Stage, scaled
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.target import FRAGMENT, WARP, GemmConfig
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64

_RUN = 8
"""Float16 values of 16 bytes, which are read at once."""
_PAD = {"int8": 16, "float16": 8}
"""Elements between lines in shared memory: 16 bytes, against bank conflicts."""
_SUM_PAD = 4
"""The same between lines of sums."""


def has_matrix(spec: LinearSpec, config: GemmConfig) -> bool:
    """Whether the linear goes by matrix instructions: int8 with one scale on either side, or float16."""
    if not spec.target.fragments or spec.k % config.block_k:
        return False
    return spec.dtype == "float16" if spec.x_quant is None else len(spec.segment_sizes) == 1


def matrix_memory(spec: LinearSpec, config: GemmConfig) -> int:
    """Bytes of memory that the threads of a tile share."""
    dtype, size = ("float16", 2) if spec.x_quant is None else ("int8", 1)
    operands = (config.block_m + config.block_n) * (config.block_k + _PAD[dtype]) * size
    return operands + config.block_m * (config.block_n + _SUM_PAD) * 4


def emit_matrix(spec: LinearSpec, config: GemmConfig, buffers: Buffers, m: Any) -> None:
    """A grid of tiles; a warp of threads for each part of a tile."""
    warps = config.warps_m * config.warps_n
    with (
        T.launch_thread("blockIdx.x", -(-spec.n // config.block_n)) as block,
        T.launch_thread("blockIdx.y", (m + i64(config.block_m - 1)) // i64(config.block_m)) as line,
        T.launch_thread("threadIdx.y", warps) as warp,
        T.launch_thread("threadIdx.x", WARP) as lane,
    ):
        thread = warp * tirx.const(WARP, "int32") + lane
        stage = Stage(spec, config, buffers, m, (block, line), thread, warps * WARP)
        _Matrix(spec, buffers, stage, warp).emit()


class _Matrix:
    """The fragments of one warp: some of the rows, some of the outputs, and sums of each pair."""

    def __init__(self, spec: LinearSpec, buffers: Buffers, stage: Stage, warp: Any) -> None:
        self.spec, self.buffers, self.stage, self.config = spec, buffers, stage, stage.config
        self.integer = spec.x_quant is not None
        self.dtype, self.sum = ("int8", "int32") if self.integer else ("float16", "float32")
        config, size = self.config, FRAGMENT * FRAGMENT
        self.pitch, self.sum_pitch = config.block_k + _PAD[self.dtype], config.block_n + _SUM_PAD
        self.left, self.right = (
            T.alloc_buffer((lines * self.pitch,), self.dtype, scope="shared")
            for lines in (config.block_m, config.block_n)
        )
        self.sums = T.alloc_buffer((config.block_m * self.sum_pitch,), self.sum, scope="shared")
        height, width = config.block_m // config.warps_m, config.block_n // config.warps_n
        self.fragments_m, self.fragments_n = height // FRAGMENT, width // FRAGMENT
        self.a = T.alloc_buffer((self.fragments_m * size,), self.dtype, scope="wmma.matrix_a")
        self.b = T.alloc_buffer((self.fragments_n * size,), self.dtype, scope="wmma.matrix_b")
        self.c = T.alloc_buffer((self.fragments_m * self.fragments_n * size,), self.sum, scope="wmma.accumulator")
        across = tirx.const(config.warps_n, "int32")
        self.line = (warp // across) * tirx.const(height, "int32")
        self.column = (warp % across) * tirx.const(width, "int32")

    def emit(self) -> None:
        """Multiply, then finish every sum of the tile."""
        config, fragments = self.config, self.fragments_m * self.fragments_n
        for at in range(fragments):
            _call("tvm_fill_fragment", self.c.data, *_SHAPE, at, tirx.const(0, self.sum))
        with T.serial(i64(0), i64(self.spec.k // config.block_k)) as turn:
            self._step(T.Bind(turn * i64(config.block_k)))
        for at in range(fragments):
            row, column = divmod(at, self.fragments_n)
            place = (self.line + FRAGMENT * row) * self.sum_pitch + self.column + FRAGMENT * column
            pointer = self.sums.access_ptr("w", offset=place)
            _call("tvm_store_matrix_sync", self.c.data, *_SHAPE, at, pointer, self.sum_pitch, "row_major")
        sync()
        threads = self.stage.threads
        with T.serial(i64(0), i64(config.block_m * config.block_n // threads)) as turn:
            place = turn * i64(threads) + self.stage.thread
            line, column = T.Bind(place // i64(config.block_n)), T.Bind(place % i64(config.block_n))
            total = T.Bind(self.sums[line * i64(self.sum_pitch) + column])
            self.stage.write(line, column, lambda row, output: self._dequantized(line, column, total))

    def _dequantized(self, line: Any, column: Any, total: Any) -> Any:
        if not self.integer:
            return total
        return scaled(self.spec, self.buffers, self.stage, i64(0), line, column, total)

    def _step(self, start: Any) -> None:
        sync()
        if self.integer:
            self._fill_words(start)
        else:
            self._fill_values(start)
        sync()
        for k in range(0, self.config.block_k, FRAGMENT):
            for fragments, count, shared, first, order in (
                (self.a, self.fragments_m, self.left, self.line, "row_major"),
                (self.b, self.fragments_n, self.right, self.column, "col_major"),
            ):
                for at in range(count):
                    pointer = shared.access_ptr("r", offset=(first + FRAGMENT * at) * self.pitch + k)
                    _call("tvm_load_matrix_sync", fragments.data, *_SHAPE, at, pointer, self.pitch, order)
            for at in range(self.fragments_m * self.fragments_n):
                row, column = divmod(at, self.fragments_n)
                _call("tvm_mma_sync", self.c.data, at, self.a.data, row, self.b.data, column, self.c.data, at)

    def _fill_words(self, start: Any) -> None:
        """Stage codes, four at a time."""
        stage, pitch, config = self.stage, self.pitch, self.config
        x, weight = (
            T.decl_buffer((lines * pitch // 4,), "int32", data=buffer.data, scope="shared")
            for buffer, lines in ((self.left, config.block_m), (self.right, config.block_n))
        )
        across = config.block_k // 4
        stage.fill(x, pitch // 4, (config.block_m, across), lambda line, at: stage.x_word(line, start + at * i64(4)))
        stage.fill(
            weight, pitch // 4, (config.block_n, across), lambda line, at: stage.weight_word(line, start + at * i64(4))
        )

    def _fill_values(self, start: Any) -> None:
        """Stage float16 values."""
        stage, pitch, config = self.stage, self.pitch, self.config
        left, right = ((lines, config.block_k) for lines in (config.block_m, config.block_n))
        if self.spec.dtype_of("x") == self.dtype:
            stage.fill(self.left, pitch, left, lambda line, at: stage.x_run(line, start + at, _RUN), _RUN)
        else:
            stage.fill(self.left, pitch, left, lambda line, at: stage.x_value(line, start + at))
        stage.fill(self.right, pitch, right, lambda line, at: stage.weight_value(line, start + at))


_SHAPE = (FRAGMENT, FRAGMENT, FRAGMENT)


def _call(name: str, *arguments: Any) -> None:
    T.evaluate(getattr(T, name)(*arguments))
