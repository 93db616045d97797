"""Norms and activation functions row by row: what is done with each value, whoever goes over the columns.

A row is gone over several times; its float32 values wait in scratch memory between the passes. How a pass goes over the
columns, and how partial sums come together, is the business of :class:`Lanes`: vectors on the CPU, threads on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.tir.epilogue import kept_value, static_codes
from bitlower.backends.tvm_kernels.tir.expressions import (
    Expr,
    apply,
    codes,
    const,
    decoded,
    operand,
    qparams,
    with_lanes,
)
from bitlower.backends.tvm_kernels.tir.function import Buffers

_LARGEST = 3.4028234663852886e38


class Reduction(Protocol):
    """A sum, minimum or maximum over a row."""

    def add(self, value: Expr) -> None:
        """Take in a value, or a vector of them."""

    def result(self) -> Any:
        """All of them together."""


class Lanes(Protocol):
    """How the columns of one row are gone over."""

    def over(self, columns: int, body: Callable[[Expr], None]) -> None:
        """``body`` at every column, or vector of columns."""

    def scratch(self, columns: int) -> Any:
        """A float32 buffer for the values of a row."""

    def place(self, at: Expr) -> Any:
        """Where in it the value at ``at`` lies, within :meth:`over`."""

    def reduction(self, combine: Callable[[Expr, Expr], Expr], start: float) -> Reduction:
        """A reduction that starts from ``start``."""

    def once(self, body: Callable[[], None]) -> None:
        """``body`` once a row."""


def activation_row(spec: ActivationSpec, buffers: Buffers, row: Expr, lanes: Lanes) -> None:
    """Emit one row of an activation."""
    write = _Result(spec, buffers, row, lanes, lanes.scratch(spec.columns))
    lanes.over(spec.columns, lambda at: write.value(at, T.Bind(_activated(spec, buffers, row, at))))
    write.finish()


def norm_row(spec: NormSpec, buffers: Buffers, row: Expr, lanes: Lanes) -> None:
    """Emit one row of a norm: sum and mean, squares, result, and codes once their range is known."""
    scratch = lanes.scratch(spec.columns)
    size = tirx.const(float(spec.columns), "float32")
    added = lanes.reduction(lambda a, b: a + b, 0.0)

    def gather(at: Expr) -> None:
        x = operand(spec.x_codes, buffers, "x", (row, at), spec.columns)
        if spec.residual:
            x = x + operand(spec.residual_codes, buffers, "residual", (row, at), spec.columns)
        x = T.Bind(x)
        if spec.keep_sum:
            T.buffer_store(buffers["sum"], x.astype(with_lanes(spec.dtype_of("sum"), x)), [row, at])
        T.buffer_store(scratch, x, [lanes.place(at)])
        added.add(x)

    lanes.over(spec.columns, gather)
    mean = T.Bind(added.result() / size) if spec.kind == "layer" else tirx.const(0.0, "float32")
    squares = lanes.reduction(lambda a, b: a + b, 0.0)

    def square(at: Expr) -> None:
        x = scratch[lanes.place(at)]
        x = T.Bind(x - _like(mean, x))
        squares.add(x * x)

    lanes.over(spec.columns, square)
    root = T.Bind(tirx.sqrt(squares.result() / size + tirx.const(spec.epsilon, "float32")))
    write = _Result(spec, buffers, row, lanes, scratch)

    def normal(at: Expr) -> None:
        x = scratch[lanes.place(at)]
        y = (x - _like(mean, x)) / _like(root, x) * _wide(buffers["weight"][at])
        write.value(at, T.Bind(y + _wide(buffers["bias"][at]) if spec.bias else y))

    lanes.over(spec.columns, normal)
    write.finish()


class _Result:
    """Where the float32 values of a row go: out at once, or to ``scratch`` until a dynamic range is known."""

    def __init__(
        self, spec: NormSpec | ActivationSpec, buffers: Buffers, row: Expr, lanes: Lanes, scratch: Any
    ) -> None:
        self.spec, self.output, self.buffers, self.row = spec, spec.output, buffers, row
        self.lanes, self.scratch = lanes, scratch
        self.dynamic = self.output is not None and self.output.granularity.dynamic
        if self.dynamic:
            self.low, self.high = lanes.reduction(tirx.min, _LARGEST), lanes.reduction(tirx.max, -_LARGEST)

    def value(self, at: Expr, y: Expr) -> None:
        """Take the value, or vector, at ``at``."""
        if self.dynamic:
            T.buffer_store(self.scratch, y, [self.lanes.place(at)])
            self.low.add(y)
            self.high.add(y)
        elif self.output is None:
            T.buffer_store(
                self.buffers["values"], y.astype(with_lanes(self.spec.dtype_of("values"), y)), [self.row, at]
            )
        else:
            code = static_codes(self.output, self.buffers, y, at, self.spec.columns)
            T.buffer_store(self.buffers["codes"], code, [self.row, at])
            if self.spec.keep:
                T.buffer_store(self.buffers["values"], kept_value(self.spec, self.buffers, y, at), [self.row, at])

    def finish(self) -> None:
        """Round what waits for its range."""
        if not self.dynamic or self.output is None:
            return
        grid, buffers = self.output.grid, self.buffers
        scale, zero = (T.Bind(part) for part in qparams(self.low.result(), self.high.result(), grid))

        def store() -> None:
            T.buffer_store(buffers["out_scale"], scale, [self.row])
            T.buffer_store(buffers["out_zero"], zero, [self.row])

        self.lanes.once(store)
        dtype = "int8" if grid.signed else "uint8"

        def one(at: Expr) -> None:
            y = self.scratch[self.lanes.place(at)]
            code = T.Bind(codes(y, _like(scale, y), _like(zero, y), grid))
            T.buffer_store(buffers["codes"], code.astype(with_lanes(dtype, y)), [self.row, at])
            if self.spec.keep:
                value = decoded(code, _like(scale, y), _like(zero, y)) if self.spec.keep == "rounded" else y
                T.buffer_store(
                    buffers["values"], value.astype(with_lanes(self.spec.dtype_of("values"), y)), [self.row, at]
                )

        self.lanes.over(self.spec.columns, one)


def _activated(spec: ActivationSpec, buffers: Buffers, row: Expr, at: Expr) -> Any:
    width = spec.columns * (2 if spec.gate == "halves" else 1)

    def read(index: Expr) -> Any:
        x = operand(spec.x_codes, buffers, "x", (row, index), width)
        return x + _wide(buffers["bias"][index]) if spec.bias else x

    y = apply(spec.activation, T.Bind(read(at)))
    if spec.gate == "separate":
        y = y * operand(spec.gate_codes, buffers, "gate", (row, at), spec.columns)
    elif spec.gate == "halves":
        y = y * read(at + const(spec.columns, at))
    return y + operand(spec.residual_codes, buffers, "residual", (row, at), spec.columns) if spec.residual else y


def _wide(x: Expr) -> Any:
    return x.astype(with_lanes("float32", x))


def _like(value: Expr, other: Expr) -> Any:
    """A scalar on as many lanes as ``other`` has."""
    lanes = with_lanes("", other)[1:]
    return tirx.Broadcast(value, int(lanes)) if lanes else value
