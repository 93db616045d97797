"""Tiles of a product: what a block of threads stages in shared memory, and the scales of its sums."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.unpack import signed_bytes, zero_shift
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.target import GemmConfig
from bitlower.backends.tvm_kernels.tir.epilogue import write
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64, when
from bitlower.backends.tvm_kernels.tir.weight import centred_code, dequantized


def depth(spec: LinearSpec, most: int = 32) -> int:
    """Inputs that are staged at a time, ``most`` or a part of it; they lie in one segment. 0: none fits."""
    sizes = (*spec.segment_sizes, spec.k)
    fitting = (n for n in (64, 32, 16, 8, 4) if n <= most and all(size % n == 0 for size in sizes))
    return next(fitting, 0)


class Stage:
    """A tile's place, and how threads fill shared memory with it.

    Args:
        spec: the linear.
        config: the sizes of the tile.
        buffers: its arguments.
        m: how many there are.
        blocks: indices of the tile, along the outputs and the rows.
        thread: the index of the thread in its block.
        threads: how many there are.
    """

    def __init__(
        self,
        spec: LinearSpec,
        config: GemmConfig,
        buffers: Buffers,
        m: Any,
        blocks: tuple[Any, Any],
        thread: Any,
        threads: int,
    ) -> None:
        self.spec, self.config, self.buffers, self.m, self.threads = spec, config, buffers, m, threads
        self.first_output, self.first_row = (
            T.Bind(block.astype("int64") * i64(size))
            for block, size in zip(blocks, (config.block_n, config.block_m), strict=True)
        )
        self.thread = T.Bind(thread.astype("int64"))

    def fill(self, shared: Any, pitch: int, size: tuple[int, int], value: Any, lanes: int = 1) -> None:
        """``shared[line * pitch + at] = value(line, at)`` for as many lines and places as ``size`` says.

        A thread writes ``lanes`` places at once.
        """
        lines, across = size[0], size[1] // lanes
        count = lines * across
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
        return tirx.if_then_else(row < self.m, signed_bytes(self.spec, word), tirx.const(0, "int32"))

    def x_value(self, line: Expr, k: Expr) -> Any:
        """A float activation in the kernel's float type; zero beyond the rows."""
        row = self.first_row + line
        zero = tirx.const(0.0, self.spec.dtype)
        return tirx.if_then_else(row < self.m, self.buffers["x"][row, k].astype(self.spec.dtype), zero)

    def x_run(self, line: Expr, k: Expr, lanes: int) -> Any:
        """Neighbouring float activations in their own type; those of the last row beyond the rows."""
        row = tirx.min(self.first_row + line, self.m - i64(1))
        return self.buffers["x"][row, tirx.Ramp(k, i64(1), lanes)]

    def weight_word(self, line: Expr, k: Expr) -> Any:
        """Four centred codes from input ``k`` on as signed bytes."""
        output = self._output(line)
        if self.spec.bits == 8:
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
        return tirx.min(self.first_output + line, i64(self.spec.n - 1))

    def write(self, line: Expr, column: Expr, y: Any) -> None:
        """Finish and write a result that lies inside."""
        row, output = self.first_row + line, self.first_output + column
        inside = tirx.all(row < self.m, output < i64(self.spec.n))
        when(inside, lambda: write(self.spec, self.buffers, row, output, y(row, output)))


def scaled(spec: LinearSpec, buffers: Buffers, stage: Stage, part: Expr, line: Expr, column: Expr, sums: Expr) -> Any:
    """What the sum of an activation group adds to a result, float32."""
    token = spec.x_quant is not None and spec.x_quant.granularity.dynamic
    row = tirx.min(stage.first_row + line, stage.m - i64(1))
    output = tirx.min(stage.first_output + column, i64(spec.n - 1))
    at = row if token else part
    share = buffers["weight_sum"][part, output]
    if spec.grouped:
        zero = buffers["x_zero"][at] - tirx.const(float(zero_shift(spec)), "float32")
        return (sums - zero * share) * buffers["x_scale"][at]
    zero = buffers["x_zero"][at].astype("int32") - tirx.const(zero_shift(spec), "int32")
    exact = (sums - zero * share).astype("float32")
    return exact * buffers["weight_scale"][output, i64(0)] * buffers["x_scale"][at]
