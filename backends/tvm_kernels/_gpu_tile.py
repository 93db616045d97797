"""Products of many rows on a GPU: tiles of 64 x 64 results, operands staged in shared memory.

The producer of the weight's tile unfolds and centres the packed codes (or dequantizes them), so that the inner loops
read bytes or floats. Three inner loops: products of bytes by ``dp4a`` and float32 products, 4 x 4 results a thread, and
the matrix instructions for int8 and float16, 32 x 32 results a warp.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels._build_linear import centred_code, dequantized
from bitlower.backends.tvm_kernels._expressions import Expr
from bitlower.backends.tvm_kernels._frame import Buffers, i64, when
from bitlower.backends.tvm_kernels._gpu_frame import dot_bytes
from bitlower.backends.tvm_kernels._gpu_gemv import signed_bytes, zero_shift
from bitlower.backends.tvm_kernels._segments import Segment, over_parts
from bitlower.backends.tvm_kernels._spec import LinearSpec
from bitlower.backends.tvm_kernels._write import write

TILE = 64
_SIDE = 16
"""Threads along each side of a tile."""
_EACH = TILE // _SIDE


def depth(spec: LinearSpec) -> int:
    """Inputs that are staged at a time; they lie in one segment. 0: none fits."""
    sizes = (*spec.segment_sizes, spec.inputs)
    return next((n for n in (32, 16, 8, 4) if all(size % n == 0 for size in sizes)), 0)


class Stage:
    """A tile's place, and how threads fill shared memory with it.

    Args:
        spec: the linear.
        buffers: its arguments.
        rows: how many there are.
        blocks: indices of the tile, along the outputs and the rows.
        thread: the index of the thread in its block.
        threads: how many there are.
    """

    def __init__(
        self, spec: LinearSpec, buffers: Buffers, rows: Any, blocks: tuple[Any, Any], thread: Any, threads: int
    ) -> None:
        self.spec, self.buffers, self.rows, self.threads = spec, buffers, rows, threads
        self.first_output, self.first_row = (T.Bind(block.astype("int64") * i64(TILE)) for block in blocks)
        self.thread = T.Bind(thread.astype("int64"))

    def fill(self, shared: Any, pitch: int, across: int, value: Any, lanes: int = 1) -> None:
        """``shared[line * pitch + at] = value(line, at)`` for 64 lines and ``across`` places, ``lanes`` at once."""
        across //= lanes
        count = TILE * across
        with T.serial(i64(0), i64(-(-count // self.threads))) as turn:
            place = T.Bind(turn * i64(self.threads) + self.thread)
            line, at = T.Bind(place // i64(across)), T.Bind(place % i64(across))

            def one() -> None:
                start = line * i64(pitch) + at * i64(lanes)
                run = tirx.Ramp(start, i64(1), lanes) if lanes > 1 else start
                T.buffer_store(shared, value(line, at * i64(lanes)), [run])

            if count % self.threads:
                when(place < i64(count), one)
            else:
                one()

    def x_word(self, line: Expr, k: Expr) -> Any:
        """Four activation codes from input ``k`` on as signed bytes; zero beyond the rows."""
        row = self.first_row + line
        word = tirx.reinterpret("int32", self.buffers["x"][row, tirx.Ramp(k, i64(1), 4)])
        return tirx.if_then_else(row < self.rows, signed_bytes(self.spec, word), tirx.const(0, "int32"))

    def x_value(self, line: Expr, k: Expr) -> Any:
        """A float activation in the kernel's float type; zero beyond the rows."""
        row = self.first_row + line
        zero = tirx.const(0.0, self.spec.dtype)
        return tirx.if_then_else(row < self.rows, self.buffers["x"][row, k].astype(self.spec.dtype), zero)

    def x_run(self, line: Expr, k: Expr, lanes: int) -> Any:
        """Neighbouring float activations in their own type; those of the last row beyond the rows."""
        row = tirx.min(self.first_row + line, self.rows - i64(1))
        return self.buffers["x"][row, tirx.Ramp(k, i64(1), lanes)]

    def weight_word(self, line: Expr, k: Expr) -> Any:
        """Four centred codes from input ``k`` on as signed bytes."""
        output = self._output(line)
        if self.spec.width == 8:
            return tirx.reinterpret("int32", self.buffers["weight"][output, tirx.Ramp(k, i64(1), 4)])
        word = None
        for byte in range(4):
            code = centred_code(self.spec, self.buffers, output, k + i64(byte)) & tirx.const(255, "int32")
            part = code << tirx.const(8 * byte, "int32")
            word = part if word is None else word | part
        return word

    def weight_value(self, line: Expr, k: Expr) -> Any:
        """A dequantized weight, in the kernel's float type."""
        return dequantized(self.spec, self.buffers, self._output(line), k).astype(self.spec.dtype)

    def _output(self, line: Expr) -> Any:
        """The output of a line; the last one beyond the end, where nothing is written."""
        return tirx.min(self.first_output + line, i64(self.spec.outputs - 1))

    def write(self, line: Expr, column: Expr, y: Any) -> None:
        """Finish and write a result that lies inside."""
        row, output = self.first_row + line, self.first_output + column
        inside = tirx.all(row < self.rows, output < i64(self.spec.outputs))
        when(inside, lambda: write(self.spec, self.buffers, row, output, y(row, output)))


def sync() -> None:
    """All threads of the block meet."""
    T.evaluate(tirx.op.tvm_storage_sync("shared"))


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


def scaled(spec: LinearSpec, buffers: Buffers, stage: Stage, part: Expr, line: Expr, column: Expr, sums: Expr) -> Any:
    """What the sum of an activation group adds to a result, float32."""
    token = spec.activation is not None and spec.activation.granularity.dynamic
    row = tirx.min(stage.first_row + line, stage.rows - i64(1))
    output = tirx.min(stage.first_output + column, i64(spec.outputs - 1))
    at = row if token else part
    share = buffers["weight_sum"][part, output]
    if spec.grouped:
        zero = buffers["x_zero"][at] - tirx.const(float(zero_shift(spec)), "float32")
        return (sums - zero * share) * buffers["x_scale"][at]
    zero = buffers["x_zero"][at].astype("int32") - tirx.const(zero_shift(spec), "int32")
    exact = (sums - zero * share).astype("float32")
    return exact * buffers["weight_scale"][output, i64(0)] * buffers["x_scale"][at]


def _results(dtype: str) -> Any:
    return T.alloc_buffer((_EACH * _EACH,), dtype, scope="local")


def _clear(held: Any, dtype: str) -> None:
    for at in range(_EACH * _EACH):
        T.buffer_store(held, tirx.const(0, dtype), [at])
