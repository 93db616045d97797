"""The function around a kernel that is written with TVM's IRBuilder: its buffers, indices and conditions.

Python loops unroll; what is stored at constant places of a local buffer stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.arguments import arguments
from bitlower.backends.tvm_kernels.spec.base import KernelSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr

Buffers = dict[str, Any]


def function(spec: KernelSpec, body: Callable[[Buffers, Any], None], name: str = "") -> Any:
    """The PrimFunc of ``spec`` whose body is what ``body(buffers, m)`` emits.

    Args:
        spec: of the kernel.
        body: gets the buffers by name and M, the number of rows, which is known at run time.
        name: of the function; empty: the spec's.
    """
    m = tirx.Var("m", "int64")
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name or spec.name)
        T.func_attr(attributes(spec, name))
        handles = {argument.name: T.arg(argument.name, T.handle()) for argument in arguments(spec)}
        buffers = {}
        for argument in arguments(spec):
            shape = [m if size is None else i64(size) for size in argument.shape]
            buffers[argument.name] = T.match_buffer(handles[argument.name], shape, argument.dtype)
        body(buffers, m)
    return builder.get()


def i64(value: int) -> Any:
    """An index."""
    return tirx.IntImm("int64", value)


def when(condition: Expr, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Emit ``body`` under a condition."""
    with T.If(condition):
        with T.Then():
            body()
        if otherwise is not None:
            with T.Else():
                otherwise()


def attributes(spec: KernelSpec, name: str = "") -> dict[str, Any]:
    """What every function of the spec bears; ``name`` if it is not the spec's."""
    return {"global_symbol": name or spec.name, "tirx.noalias": True, "bitlower.family": spec.family}
