"""Products of many rows on a GPU by ``dp4a`` or in float32: tiles of results, operands staged in shared memory.

The producer of the weight's tile unpacks and centres the codes (or dequantizes them), so that the inner loops read
bytes or floats. Each of 256 threads has as many results: 4 x 4 of a tile of 64 x 64.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import dot_bytes, sync
from bitlower.backends.tvm_kernels.schedules.gpu.tile import Stage, depth, scaled
from bitlower.backends.tvm_kernels.spec.base import HALF
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.target import FRAGMENT, GemmConfig
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when
from bitlower.backends.tvm_kernels.tir.segments import Segment, over_parts


def tile_memory(spec: LinearSpec, config: GemmConfig) -> int:
    """Bytes of memory that the threads of a tile share."""
    staged = depth(spec, config.block_k)
    words, size = (staged // 4, 4) if spec.x_quant is not None else (staged, 2 if spec.dtype == HALF else 4)
    return (config.block_m + config.block_n) * (words + 1) * size


def emit_tiles(spec: LinearSpec, config: GemmConfig, buffers: Buffers, m: Any) -> None:
    """Tiles by ``dp4a`` or float32 products: 256 threads, in blocks of 64 x 64 with 4 x 4 results each."""
    with (
        T.launch_thread("blockIdx.x", -(-spec.n // config.block_n)) as block,
        T.launch_thread("blockIdx.y", (m + i64(config.block_m - 1)) // i64(config.block_m)) as line,
        T.launch_thread("threadIdx.x", FRAGMENT * FRAGMENT) as thread,
    ):
        stage = Stage(spec, config, buffers, m, (block, line), thread, FRAGMENT * FRAGMENT)
        _Threads(spec, buffers, stage).emit()


class _Threads:
    """The results of one thread: lines ``ty + 16·i``, columns ``tx + 16·j`` of the tile, ``i`` and ``j`` from 0 on."""

    def __init__(self, spec: LinearSpec, buffers: Buffers, stage: Stage) -> None:
        self.spec, self.buffers, self.stage = spec, buffers, stage
        self.integer = spec.x_quant is not None
        self.depth = depth(spec, stage.config.block_k)
        self.lines, self.columns = (size // FRAGMENT for size in (stage.config.block_m, stage.config.block_n))
        self.across = self.depth // 4 if self.integer else self.depth
        self.pitch = self.across + 1
        dtype = "int32" if self.integer else spec.dtype
        self.left, self.right = (
            T.alloc_buffer((size * self.pitch,), dtype, scope="shared")
            for size in (stage.config.block_m, stage.config.block_n)
        )
        self.column, self.line = (
            T.Bind(part) for part in (stage.thread % i64(FRAGMENT), stage.thread // i64(FRAGMENT))
        )

    def emit(self) -> None:
        """All activation groups, then what is written."""
        total = self._results("float32")
        if not self.integer:
            self._sum(Segment(i64(0), self.spec.k, i64(0)), total)
        else:
            over_parts(self.spec, lambda part, segments: self._activation_group(part, segments, total))
        for at, (i, j) in enumerate(self._places()):
            self.stage.write(*self._place(i, j), lambda row, output, at=at: total[at])

    def _places(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.lines) for j in range(self.columns)]

    def _results(self, dtype: str) -> Any:
        """A number for each result, zero to begin with."""
        made = T.alloc_buffer((self.lines * self.columns,), dtype, scope="local")
        self._clear(made, dtype)
        return made

    def _clear(self, sums: Any, dtype: str) -> None:
        for at in range(self.lines * self.columns):
            T.buffer_store(sums, tirx.const(0, dtype), [at])

    def _place(self, i: int, j: int) -> tuple[Any, Any]:
        return self.line + i64(FRAGMENT * i), self.column + i64(FRAGMENT * j)

    def _activation_group(self, part: Expr, segments: list[tuple[Segment, int]], total: Any) -> None:
        """Add what one group of inputs with one activation scale returns."""
        dtype = "float32" if self.spec.grouped else "int32"
        sums = self._results(dtype)
        for segment, times in segments:
            if self.spec.grouped:
                self._add_run(segment, times, sums)
            else:
                self._sum(segment, sums)
        for at, (i, j) in enumerate(self._places()):
            term = scaled(self.spec, self.buffers, self.stage, part, *self._place(i, j), sums[at])
            T.buffer_store(total, total[at] + term, [at])

    def _add_run(self, first: Segment, times: int, total: Any) -> None:
        """Add the segments of a run, each scaled once its integer sum is whole.

        One loop over all their tiles: a loop inside a loop would be unrolled by the compiler, and spill.
        """
        sums, each = self._results("int32"), first.size // self.depth

        def flush(group: Expr) -> None:
            for at, (i, j) in enumerate(self._places()):
                output = tirx.min(self.stage.first_output + self._place(i, j)[1], i64(self.spec.n - 1))
                scale = self.buffers["weight_scale"][output, group]
                T.buffer_store(total, total[at] + sums[at].astype("float32") * scale, [at])
            self._clear(sums, "int32")

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
        left, right = ((size, self.across) for size in (stage.config.block_m, stage.config.block_n))
        stage.fill(self.left, self.pitch, left, lambda line, at: x(line, start + at * i64(each)))
        stage.fill(self.right, self.pitch, right, lambda line, at: weight(line, start + at * i64(each)))
        sync()
        with T.serial(0, self.across) as at:
            self._multiply(at.astype("int64"), sums)

    def _multiply(self, at: Expr, sums: Any) -> None:
        left = [T.Bind(self.left[(self.line + i64(FRAGMENT * i)) * i64(self.pitch) + at]) for i in range(self.lines)]
        right = [
            T.Bind(self.right[(self.column + i64(FRAGMENT * j)) * i64(self.pitch) + at]) for j in range(self.columns)
        ]
        for place, (i, j) in enumerate(self._places()):
            if self.integer:
                value = dot_bytes(self.spec.target, sums[place], left[i], right[j])
            else:
                value = sums[place] + left[i].astype("float32") * right[j].astype("float32")
            T.buffer_store(sums, value, [place])
