"""Tiles by the matrix instructions of NVIDIA GPUs: int8 with int32 sums, float16 with float32 sums, 16 x 16 x 16.

Four warps share a tile of 64 x 64 results, 32 x 32 each. Codes of fewer bits are unfolded (int8) or dequantized
(float16) as they are written to shared memory. The sums go through shared memory to the epilogue, for the place of a
sum within the registers of a warp is not documented.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import sync
from bitlower.backends.tvm_kernels.schedules.gpu.tile import TILE, Stage, scaled
from bitlower.backends.tvm_kernels.spec.base import Target
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64

_FRAGMENT = 16
_WARPS, _WARP = 4, 32
_DEPTH = 32
_RUN = 8
"""Float16 values of 16 bytes, which are read at once."""
_PITCH = {"int8": 48, "float16": 40}
"""Elements from line to line in shared memory: 16 bytes more than a line, against bank conflicts."""
_SUM_PITCH = TILE + 4


def has_matrix(spec: LinearSpec) -> bool:
    """Whether the linear goes by matrix instructions: int8 with one scale on either side, or float16."""
    if spec.target is not Target.CUDA or spec.inputs % _DEPTH:
        return False
    return spec.dtype == "float16" if spec.activation is None else len(spec.segment_sizes) == 1


def emit_matrix(spec: LinearSpec, buffers: Buffers, rows: Any) -> None:
    """A grid of tiles; 128 threads a tile."""
    with (
        T.launch_thread("blockIdx.x", -(-spec.outputs // TILE)) as block,
        T.launch_thread("blockIdx.y", (rows + i64(TILE - 1)) // i64(TILE)) as line,
        T.launch_thread("threadIdx.y", _WARPS) as warp,
        T.launch_thread("threadIdx.x", _WARP) as lane,
    ):
        thread = warp * tirx.const(_WARP, "int32") + lane
        stage = Stage(spec, buffers, rows, (block, line), thread, _WARPS * _WARP)
        _Matrix(spec, buffers, stage, warp).emit()


class _Matrix:
    """The fragments of one warp: two of the rows, two of the outputs, four of sums."""

    def __init__(self, spec: LinearSpec, buffers: Buffers, stage: Stage, warp: Any) -> None:
        self.spec, self.buffers, self.stage = spec, buffers, stage
        self.integer = spec.activation is not None
        self.dtype, self.sum = ("int8", "int32") if self.integer else ("float16", "float32")
        self.pitch = _PITCH[self.dtype]
        self.left, self.right = (T.alloc_buffer((TILE * self.pitch,), self.dtype, scope="shared") for _ in range(2))
        self.sums = T.alloc_buffer((TILE * _SUM_PITCH,), self.sum, scope="shared")
        size = _FRAGMENT * _FRAGMENT
        self.a = T.alloc_buffer((2 * size,), self.dtype, scope="wmma.matrix_a")
        self.b = T.alloc_buffer((2 * size,), self.dtype, scope="wmma.matrix_b")
        self.c = T.alloc_buffer((4 * size,), self.sum, scope="wmma.accumulator")
        self.line = (warp // tirx.const(2, "int32")) * tirx.const(32, "int32")
        self.column = (warp % tirx.const(2, "int32")) * tirx.const(32, "int32")

    def emit(self) -> None:
        """Multiply, then finish every sum of the tile."""
        for at in range(4):
            _call("tvm_fill_fragment", self.c.data, *_SHAPE, at, tirx.const(0, self.sum))
        with T.serial(i64(0), i64(self.spec.inputs // _DEPTH)) as turn:
            self._step(T.Bind(turn * i64(_DEPTH)))
        for at in range(4):
            place = (self.line + 16 * (at // 2)) * _SUM_PITCH + self.column + 16 * (at % 2)
            pointer = self.sums.access_ptr("w", offset=place)
            _call("tvm_store_matrix_sync", self.c.data, *_SHAPE, at, pointer, _SUM_PITCH, "row_major")
        sync()
        with T.serial(i64(0), i64(TILE * TILE // (_WARPS * _WARP))) as turn:
            place = turn * i64(_WARPS * _WARP) + self.stage.thread
            line, column = T.Bind(place // i64(TILE)), T.Bind(place % i64(TILE))
            total = T.Bind(self.sums[line * i64(_SUM_PITCH) + column])
            self.stage.write(line, column, lambda row, output: self._dequantized(line, column, total))

    def _dequantized(self, line: Any, column: Any, total: Any) -> Any:
        if not self.integer:
            return total
        return scaled(self.spec, self.buffers, self.stage, i64(0), line, column, total)

    def _step(self, start: Any) -> None:
        stage, pitch = self.stage, self.pitch
        sync()
        if self.integer:
            words = [
                T.decl_buffer((TILE * pitch // 4,), "int32", data=b.data, scope="shared")
                for b in (self.left, self.right)
            ]
            stage.fill(words[0], pitch // 4, _DEPTH // 4, lambda line, at: stage.x_word(line, start + at * i64(4)))
            stage.fill(words[1], pitch // 4, _DEPTH // 4, lambda line, at: stage.weight_word(line, start + at * i64(4)))
        else:
            if self.spec.dtype_of("x") == self.dtype:
                stage.fill(self.left, pitch, _DEPTH, lambda line, at: stage.x_run(line, start + at, _RUN), _RUN)
            else:
                stage.fill(self.left, pitch, _DEPTH, lambda line, at: stage.x_value(line, start + at))
            stage.fill(self.right, pitch, _DEPTH, lambda line, at: stage.weight_value(line, start + at))
        sync()
        for k in range(0, _DEPTH, _FRAGMENT):
            for at in range(2):
                for fragments, shared, first, order in (
                    (self.a, self.left, self.line, "row_major"),
                    (self.b, self.right, self.column, "col_major"),
                ):
                    pointer = shared.access_ptr("r", offset=(first + 16 * at) * pitch + k)
                    _call("tvm_load_matrix_sync", fragments.data, *_SHAPE, at, pointer, pitch, order)
            for at in range(4):
                operands = (self.c.data, at, self.a.data, at // 2, self.b.data, at % 2, self.c.data, at)
                _call("tvm_mma_sync", *operands)


_SHAPE = (_FRAGMENT, _FRAGMENT, _FRAGMENT)


def _call(name: str, *arguments: Any) -> None:
    T.evaluate(getattr(T, name)(*arguments))
