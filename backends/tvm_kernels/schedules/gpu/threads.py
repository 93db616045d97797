"""What GPU kernels share: a row a block, reductions over threads, products of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.tir.expressions import Expr, dtype_of
from bitlower.backends.tvm_kernels.tir.function import i64, when


def all_reduce(combine: Callable[[Expr, Expr], Expr], start: Expr, value: Expr, threads: list[Any]) -> Any:
    """``value`` of all threads together, on every one of them (warp shuffles where the target has them)."""
    dtype = dtype_of(value)
    part, out = (T.alloc_buffer((1,), dtype, scope="local") for _ in range(2))
    T.buffer_store(part, value, [0])
    reducer = T.comm_reducer(lambda a, b: combine(a, b), [start])
    with T.attr(reducer, "reduce_scope", tirx.const(0, "int32")):
        always = tirx.const(1, "bool")
        T.evaluate(tirx.op.tvm_thread_allreduce(tirx.const(1, "uint32"), part[0], always, out[0], *threads))
    return out[0]


def dot_bytes(target: Target, total: Expr, left: Expr, right: Expr) -> Any:
    """``total`` plus the products of four pairs of signed bytes, int32: one instruction on NVIDIA GPUs."""
    if target.byte_products == "dp4a":
        return tirx.call_pure_extern("int32", "__dp4a", left, right, total)
    for byte in range(4):
        total = total + _byte(left, byte) * _byte(right, byte)
    return total


def add_bytes(target: Target, total: Expr, word: Expr) -> Any:
    """``total`` plus four signed bytes, int32."""
    if target.byte_products == "dp4a":
        return dot_bytes(target, total, word, tirx.const(0x01010101, "int32"))
    for byte in range(4):
        total = total + _byte(word, byte)
    return total


def _byte(word: Expr, byte: int) -> Any:
    return (word << tirx.const(24 - 8 * byte, "int32")) >> tirx.const(24, "int32")


class ThreadLanes:
    """The columns of a row, shared out among the threads of a block.

    Args:
        thread: its index.
        threads: how many there are.
    """

    def __init__(self, thread: Any, threads: int) -> None:
        self.thread, self.threads = thread, threads
        self._turn: Any = None

    def over(self, columns: int, body: Callable[[Expr], None]) -> None:
        """``body`` at every column of this thread."""
        with T.unroll(i64(0), i64(-(-columns // self.threads))) as turn:
            self._turn = turn
            at = turn * i64(self.threads) + self.thread.astype("int64")
            if columns % self.threads:
                when(at < i64(columns), lambda: body(at))
            else:
                body(at)

    def scratch(self, columns: int) -> Any:
        """Registers: a thread reads what it wrote itself."""
        return T.alloc_buffer((-(-columns // self.threads),), "float32", scope="local")

    def place(self, at: Expr) -> Any:
        """How many columns of this thread came before."""
        return self._turn

    def reduction(self, combine: Callable[[Expr, Expr], Expr], start: float) -> ThreadReduction:
        """A partial result in each thread."""
        return ThreadReduction(combine, start, self.thread)

    def once(self, body: Callable[[], None]) -> None:
        """In the first thread."""
        when(self.thread.equal(tirx.const(0, "int32")), body)


class ThreadReduction:
    """A sum, minimum or maximum, a part of it in each thread.

    Args:
        combine: of two float32 expressions.
        start: what it starts from.
        thread: the index of the thread.
    """

    def __init__(self, combine: Callable[[Expr, Expr], Expr], start: float, thread: Any) -> None:
        self._combine, self._thread = combine, thread
        self._start = tirx.const(start, "float32")
        self._held = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(self._held, self._start, [0])

    def add(self, value: Expr) -> None:
        """Take in a value."""
        T.buffer_store(self._held, self._combine(self._held[0], value), [0])

    def result(self) -> Any:
        """All threads together."""
        return T.Bind(all_reduce(self._combine, self._start, self._held[0], [self._thread]))


def sync() -> None:
    """All threads of the block meet."""
    T.evaluate(tirx.op.tvm_storage_sync("shared"))
