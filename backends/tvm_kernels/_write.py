"""The end of every linear: what is made of a float32 sum, and written."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels._build_linear import finish, kept_value, static_codes
from bitlower.backends.tvm_kernels._expressions import Expr
from bitlower.backends.tvm_kernels._frame import Buffers
from bitlower.backends.tvm_kernels._spec import LinearSpec


def write(spec: LinearSpec, buffers: Buffers, row: Expr, at: Expr, y: Expr) -> None:
    """Write what the kernel returns of the sum, or vector of sums, at ``at``."""
    y = T.Bind(finish(spec, buffers, y, row, at))
    if spec.output is None:
        T.buffer_store(buffers["values"], y, [row, at])
        return
    T.buffer_store(buffers["codes"], static_codes(spec.output, buffers, y, at, spec.outputs), [row, at])
    if spec.keep:
        T.buffer_store(buffers["values"], kept_value(spec, buffers, y, at), [row, at])
