"""Products of many rows on a GPU: tiles of 64 x 64 results, operands staged in shared memory.

The producer of the weight's tile unfolds and centres the packed codes (or dequantizes them), so that the inner loops
read bytes or floats. Three inner loops: products of bytes by ``dp4a`` and float32 products, 4 x 4 results a thread, and
the matrix instructions for int8 and float16, 32 x 32 results a warp.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import dot_bytes, sync
from bitlower.backends.tvm_kernels.schedules.gpu.tile import _EACH, _SIDE, TILE, Stage, depth, scaled
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when
from bitlower.backends.tvm_kernels.tir.segments import Segment, over_parts


def emit_tiles(spec: LinearSpec, buffers: Buffers, rows: Any) -> None:
    """Tiles by ``dp4a`` or float32 products: 256 threads, 4 x 4 results each."""
    with (
        T.launch_thread("blockIdx.x", -(-spec.outputs // TILE)) as block,
        T.launch_thread("blockIdx.y", (rows + i64(TILE - 1)) // i64(TILE)) as line,
        T.launch_thread("threadIdx.x", _SIDE * _SIDE) as thread,
    ):
        stage = Stage(spec, buffers, rows, (block, line), thread, _SIDE * _SIDE)
        _Threads(spec, buffers, stage).emit()


class _Threads:
    """The results of one thread: lines ``ty + 16·i``, columns ``tx + 16·j`` of the tile."""

    def __init__(self, spec: LinearSpec, buffers: Buffers, stage: Stage) -> None:
        self.spec, self.buffers, self.stage = spec, buffers, stage
        self.integer = spec.activation is not None
        self.depth = depth(spec)
        self.across = self.depth // 4 if self.integer else self.depth
        self.pitch = self.across + 1
        dtype = "int32" if self.integer else spec.dtype
        self.left, self.right = (T.alloc_buffer((TILE * self.pitch,), dtype, scope="shared") for _ in range(2))
        self.column, self.line = (T.Bind(part) for part in (stage.thread % i64(_SIDE), stage.thread // i64(_SIDE)))

    def emit(self) -> None:
        """All activation groups, then what is written."""
        total = _results("float32")
        _clear(total, "float32")
        if not self.integer:
            self._sum(Segment(i64(0), self.spec.inputs, i64(0)), total)
        else:
            over_parts(self.spec, lambda part, found: self._activation_group(part, found, total))
        for i in range(_EACH):
            for j in range(_EACH):
                self.stage.write(*self._place(i, j), lambda row, output, at=i * _EACH + j: total[at])

    def _place(self, i: int, j: int) -> tuple[Any, Any]:
        return self.line + i64(_SIDE * i), self.column + i64(_SIDE * j)

    def _activation_group(self, part: Expr, found: list[tuple[Segment, int]], total: Any) -> None:
        """Add what one group of inputs with one activation scale returns."""
        dtype = "float32" if self.spec.grouped else "int32"
        sums = _results(dtype)
        _clear(sums, dtype)
        for segment, times in found:
            if self.spec.grouped:
                self._add_run(segment, times, sums)
            else:
                self._sum(segment, sums)
        for i in range(_EACH):
            for j in range(_EACH):
                at = i * _EACH + j
                term = scaled(self.spec, self.buffers, self.stage, part, *self._place(i, j), sums[at])
                T.buffer_store(total, total[at] + term, [at])

    def _add_run(self, first: Segment, times: int, total: Any) -> None:
        """Add the segments of a run, each scaled once its integer sum is whole.

        One loop over all their tiles: a loop inside a loop would be unrolled by the compiler, and spill.
        """
        sums, each = _results("int32"), first.size // self.depth
        _clear(sums, "int32")

        def flush(group: Expr) -> None:
            for i in range(_EACH):
                for j in range(_EACH):
                    at = i * _EACH + j
                    output = tirx.min(self.stage.first_output + self._place(i, j)[1], i64(self.spec.outputs - 1))
                    scale = self.buffers["weight_scale"][output, group]
                    T.buffer_store(total, total[at] + sums[at].astype("float32") * scale, [at])
            _clear(sums, "int32")

        with T.serial(i64(0), i64(times * each)) as turn:
            self._add_tile(T.Bind(first.start + turn * i64(self.depth)), sums)
            last = ((turn + i64(1)) % i64(each)).equal(i64(0))
            when(last, lambda: flush(first.group + turn // i64(each)))

    def _sum(self, segment: Segment, sums: Any) -> None:
        """Add the products of a segment, one staged tile after the other."""
        with T.serial(i64(0), i64(segment.size // self.depth)) as turn:
            self._add_tile(T.Bind(segment.start + turn * i64(self.depth)), sums)

    def _add_tile(self, start: Expr, sums: Any) -> None:
        stage, each = self.stage, 4 if self.integer else 1
        x, weight = (stage.x_word, stage.weight_word) if self.integer else (stage.x_value, stage.weight_value)
        sync()
        stage.fill(self.left, self.pitch, self.across, lambda line, at: x(line, start + at * i64(each)))
        stage.fill(self.right, self.pitch, self.across, lambda line, at: weight(line, start + at * i64(each)))
        sync()
        with T.serial(0, self.across) as at:
            self._multiply(at.astype("int64"), sums)

    def _multiply(self, at: Expr, sums: Any) -> None:
        left = [T.Bind(self.left[(self.line + i64(_SIDE * i)) * i64(self.pitch) + at]) for i in range(_EACH)]
        right = [T.Bind(self.right[(self.column + i64(_SIDE * j)) * i64(self.pitch) + at]) for j in range(_EACH)]
        for i in range(_EACH):
            for j in range(_EACH):
                place = i * _EACH + j
                if self.integer:
                    value = dot_bytes(self.spec.target, sums[place], left[i], right[j])
                else:
                    value = sums[place] + left[i].astype("float32") * right[j].astype("float32")
                T.buffer_store(sums, value, [place])


def _results(dtype: str) -> Any:
    return T.alloc_buffer((_EACH * _EACH,), dtype, scope="local")


def _clear(held: Any, dtype: str) -> None:
    for at in range(_EACH * _EACH):
        T.buffer_store(held, tirx.const(0, dtype), [at])
