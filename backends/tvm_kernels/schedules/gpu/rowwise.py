"""Norms and activation functions on a GPU: a block of threads a row, one kernel from the sum to the codes."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import ThreadLanes
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.spec.target import WARP
from bitlower.backends.tvm_kernels.tir.function import Buffers, function
from bitlower.backends.tvm_kernels.tir.rowwise import activation_row, norm_row

_EACH = 4
"""Columns that a thread has, as long as that gives enough threads to fill a block and not too many."""


def threads_for(columns: int) -> int:
    """Threads of a block: whole warps, 128 to 1024 where there are as many columns."""
    wanted = min(1024, max(128, columns // _EACH), columns)
    return -(-wanted // WARP) * WARP


def lower_rows(spec: NormSpec | ActivationSpec) -> Any:
    """The scheduled PrimFunc of a kernel over rows."""
    threads = threads_for(spec.columns)

    def body(buffers: Buffers, m: Any) -> None:
        with T.launch_thread("blockIdx.x", m) as block, T.launch_thread("threadIdx.x", threads) as thread:
            lanes, row = ThreadLanes(thread, threads), block.astype("int64")
            match spec:
                case NormSpec():
                    norm_row(spec, buffers, row, lanes)
                case ActivationSpec():
                    activation_row(spec, buffers, row, lanes)

    return function(spec, body)
