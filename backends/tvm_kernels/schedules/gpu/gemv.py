"""Products of single rows on a GPU: a warp an output, wide loads of packed weights, one reduction over the warp."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import add_bytes, all_reduce, dot_bytes
from bitlower.backends.tvm_kernels.schedules.gpu.unpack import bytes_at, code_at, signed_bytes, zero_shift
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import fixed_zero
from bitlower.backends.tvm_kernels.spec.target import WARP
from bitlower.backends.tvm_kernels.tir.epilogue import write
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when

WARPS = 4
"""Outputs of a block."""


def chunk(spec: LinearSpec) -> int:
    """Inputs that a thread takes at a time: 4, 2 or 1 words that lie in one segment (3 bits: three words); 0: none."""
    counts = (3,) if spec.bits == 3 else (4, 2, 1)
    for words in counts:
        inputs = 32 * words // spec.bits
        if all(size % inputs == 0 for size in (*spec.segment_sizes, spec.k)):
            return inputs
    return 0


def emit_gemv(spec: LinearSpec, buffers: Buffers, m: Any) -> None:
    """A grid of blocks of four outputs, for each of the rows."""
    blocks = -(-spec.n // WARPS)
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("blockIdx.y", m) as line,
        T.launch_thread("threadIdx.y", WARPS) as warp,
        T.launch_thread("threadIdx.x", WARP) as lane,
    ):
        output = T.Bind(block.astype("int64") * i64(WARPS) + warp.astype("int64"))
        row, inside = line.astype("int64"), T.Bind(tirx.min(output, i64(spec.n - 1)))
        _Gemv(spec, buffers, row, inside, lane).emit(output)


class _Gemv:
    """The sum of one row and one output, over the threads of a warp."""

    def __init__(self, spec: LinearSpec, buffers: Buffers, row: Expr, output: Expr, lane: Any) -> None:
        self.spec, self.buffers, self.row, self.output, self.lane = spec, buffers, row, output, lane
        self.chunk = chunk(spec)
        self.exact = spec.x_quant is not None and len(spec.segment_sizes) == 1
        self.dtype = "int32" if self.exact else "float32"
        self.total = T.alloc_buffer((1,), self.dtype, scope="local")

    def emit(self, output: Expr) -> None:
        """Add up, come together, write in the first thread."""
        T.buffer_store(self.total, tirx.const(0, self.dtype), [0])
        chunks = self.spec.k // self.chunk
        with T.serial(i64(0), i64(-(-chunks // WARP))) as turn:
            at = turn * i64(WARP) + self.lane.astype("int64")
            self._add(tirx.min(at, i64(chunks - 1)) * i64(self.chunk), at < i64(chunks))
        start = tirx.const(0, self.dtype)
        total = all_reduce(lambda a, b: a + b, start, self.total[0], [self.lane])
        first = tirx.all(self.lane.equal(tirx.const(0, "int32")), output < i64(self.spec.n))
        when(first, lambda: write(self.spec, self.buffers, self.row, output, self._dequantized(total)))

    def _add(self, start: Expr, inside: Expr) -> None:
        """Add a chunk if it is ``inside``: no thread of a warp branches off before the warp comes together."""
        start = T.Bind(start)
        if self.spec.weight is None:
            part = self._plain_part(start)
            T.buffer_store(self.total, self.total[0] + tirx.Select(inside, part, tirx.const(0.0, "float32")), [0])
            return
        words = self._weight_words(start)
        group = start // i64(self.spec.group_size)
        part = (
            self._float_part(start, words, group)
            if self.spec.x_quant is None
            else self._bytes_part(start, words, group)
        )
        if not self.exact:
            part = part * self.buffers["weight_scale"][self.output, group]
            if self.spec.x_quant is not None:
                part = part * self._x_scale("x_scale", start)
        T.buffer_store(self.total, self.total[0] + tirx.Select(inside, part, tirx.const(0, self.dtype)), [0])

    def _weight_words(self, start: Expr) -> Any:
        """The packed codes of a chunk, int32, in a local buffer."""
        spec, weight = self.spec, self.buffers["weight"]
        count = self.chunk * spec.bits // 32
        words = T.alloc_buffer((count,), "int32", scope="local")
        at = start if spec.bits == 8 else start * i64(spec.bits) // i64(32)
        _copy(words, weight, (self.output,), at, count if spec.bits != 3 else 1)
        if spec.bits == 3:
            for word in (1, 2):
                T.buffer_store(words, weight[self.output, at + i64(word)], [word])
        return words

    def _float_part(self, start: Expr, words: Any, group: Expr) -> Any:
        """Σ x·(u − z) of a chunk, float32."""
        spec = self.spec
        dtype = spec.dtype_of("x")
        lanes = 4 if dtype == "float32" else 8
        zero = T.Bind(self._zero(group))
        part = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(part, tirx.const(0.0, "float32"), [0])
        for first in range(0, self.chunk, lanes):
            count = min(lanes, self.chunk - first)
            x = T.alloc_buffer((count,), dtype, scope="local")
            vector = tirx.Ramp(start + i64(first), i64(1), count)
            T.buffer_store(x, self.buffers["x"][self.row, vector], [tirx.Ramp(0, 1, count)])
            for k in range(count):
                code = (code_at(spec, words, first + k) - zero).astype("float32")
                T.buffer_store(part, part[0] + x[k].astype("float32") * code, [0])
        return part[0]

    def _plain_part(self, start: Expr) -> Any:
        """Σ x·w of a chunk of floats."""
        run = tirx.Ramp(start, i64(1), self.chunk) if self.chunk > 1 else start
        place = tirx.Ramp(0, 1, self.chunk) if self.chunk > 1 else 0
        operands = []
        for name, row in (("x", self.row), ("weight", self.output)):
            operands.append(T.alloc_buffer((self.chunk,), str(self.buffers[name].dtype), scope="local"))
            T.buffer_store(operands[-1], self.buffers[name][row, run], [place])
        total = tirx.const(0.0, "float32")
        for k in range(self.chunk):
            total = total + operands[0][k].astype("float32") * operands[1][k].astype("float32")
        return T.Bind(total)

    def _bytes_part(self, start: Expr, words: Any, group: Expr) -> Any:
        """Σ q·(u − z) of a chunk: products of bytes, less the zero point's share of the sum of ``q``."""
        spec, target = self.spec, self.spec.target
        quads = self.chunk // 4
        codes = T.alloc_buffer((quads,), "int32", scope="local")
        _copy(codes, self.buffers["x"], (self.row,), start, quads)
        sums = [T.alloc_buffer((1,), "int32", scope="local") for _ in range(2)]
        for total in sums:
            T.buffer_store(total, tirx.const(0, "int32"), [0])
        shifted = spec.bits < 8
        for quad in range(quads):
            x = T.Bind(signed_bytes(spec, codes[quad]))
            T.buffer_store(sums[0], dot_bytes(target, sums[0][0], x, bytes_at(spec, words, quad)), [0])
            if shifted:
                T.buffer_store(sums[1], add_bytes(target, sums[1][0], x), [0])
        exact = sums[0][0] - self._zero(group) * sums[1][0] if shifted else sums[0][0]
        return exact if self.exact else exact.astype("float32")

    def _zero(self, group: Expr) -> Any:
        """The zero point of the stored codes, int32."""
        if not self.spec.has_zeros:
            return tirx.const(fixed_zero(self.spec), "int32")
        zero = self.buffers["weight_zero"][self.output, group].astype("int32")
        return zero - tirx.const(128 if self.spec.bits == 8 else 0, "int32")

    def _x_scale(self, name: str, start: Expr) -> Any:
        """A scale of the activation at an input."""
        spec, values = self.spec, self.buffers[name]
        if spec.x_quant is not None and spec.x_quant.granularity.dynamic:
            return values[self.row]
        scale = values[i64(0)]
        for part, begin in enumerate(list(accumulate(spec.x_group_sizes))[:-1], 1):
            scale = tirx.Select(start >= i64(begin), values[i64(part)], scale)
        return scale

    def _dequantized(self, total: Expr) -> Any:
        """The float32 result of the sum over the warp."""
        spec, buffers = self.spec, self.buffers
        if spec.x_quant is None:
            return total
        token = spec.x_quant.granularity.dynamic
        if self.exact:
            at = self.row if token else i64(0)
            zero = buffers["x_zero"][at].astype("int32") - tirx.const(zero_shift(spec), "int32")
            value = (total - zero * buffers["weight_sum"][i64(0), self.output]).astype("float32")
            return value * buffers["weight_scale"][self.output, i64(0)] * buffers["x_scale"][at]
        for part in range(len(spec.x_group_sizes)):
            at = self.row if token else i64(part)
            zero = buffers["x_zero"][at] - tirx.const(float(zero_shift(spec)), "float32")
            share = buffers["weight_sum"][i64(part), self.output].astype("float32")
            share = share if spec.grouped else share * buffers["weight_scale"][self.output, i64(0)]
            total = total - buffers["x_scale"][at] * zero * share
        return total


def _copy(local: Any, source: Any, row: tuple[Expr, ...], start: Expr, words: int) -> None:
    """``words`` int32 words of a row into a local buffer, in loads of at most 16 bytes; of bytes too."""
    each = 1 if str(source.dtype) == "int32" else 4
    for first in range(0, words, 4):
        count = min(4, words - first)
        at = start + i64(first * each)
        value = source[(*row, tirx.Ramp(at, i64(1), count * each) if count * each > 1 else at)]
        if each > 1:
            value = tirx.reinterpret(f"int32x{count}" if count > 1 else "int32", value)
        T.buffer_store(local, value, [tirx.Ramp(first, 1, count) if count > 1 else first])
