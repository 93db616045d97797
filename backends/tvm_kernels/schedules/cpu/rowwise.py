"""Norms and activation functions on the CPU: a row a task, in vectors of 16 lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.vectors import LANES, local, ramp
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr, with_lanes
from bitlower.backends.tvm_kernels.tir.function import Buffers, function, i64
from bitlower.backends.tvm_kernels.tir.rowwise import activation_row, norm_row


def lower_rows(spec: NormSpec | ActivationSpec) -> Any:
    """The scheduled PrimFunc of a norm or an activation."""

    def body(buffers: Buffers, m: Any) -> None:
        with T.parallel(i64(0), m) as row:
            if isinstance(spec, NormSpec):
                norm_row(spec, buffers, row, VectorLanes())
            else:
                activation_row(spec, buffers, row, VectorLanes())

    return function(spec, body)


class VectorLanes:
    """Vectors of 16 columns, and the single ones that are left."""

    def over(self, columns: int, body: Callable[[Expr], None]) -> None:
        """``body`` at every vector, then at every column that is left."""
        whole = columns // LANES * LANES
        if whole:
            with T.serial(i64(0), i64(whole // LANES)) as at:
                body(ramp(at * i64(LANES)))
        if whole < columns:
            with T.serial(i64(0), i64(columns - whole)) as at:
                body(i64(whole) + at)

    def scratch(self, columns: int) -> Any:
        """Memory of the thread."""
        return T.alloc_buffer((columns,), "float32")

    def place(self, at: Expr) -> Any:
        """The column itself."""
        return at

    def reduction(self, combine: Callable[[Expr, Expr], Expr], start: float) -> VectorReduction:
        """A partial result on each lane."""
        return VectorReduction(combine, start)

    def once(self, body: Callable[[], None]) -> None:
        """As it is."""
        body()


class VectorReduction:
    """A sum, minimum or maximum, a part of it on each of 16 lanes.

    Args:
        combine: of two float32 expressions.
        start: what it starts from.
    """

    def __init__(self, combine: Callable[[Expr, Expr], Expr], start: float) -> None:
        self._combine = combine
        [self._held] = local(1, "float32")
        self._vector = ramp(tirx.const(0, "int32"))
        T.buffer_store(self._held, tirx.const(start, "float32x16"), [self._vector])

    def add(self, value: Expr) -> None:
        """Take in a value, or a vector of them."""
        at = tirx.const(0, "int32") if with_lanes("", value) == "" else self._vector
        T.buffer_store(self._held, self._combine(self._held[at], value), [at])

    def result(self) -> Any:
        """All lanes together, in pairs, so that few results wait for each other."""
        parts = [self._held[lane] for lane in range(LANES)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [self._combine(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
        return T.Bind(parts[0])
