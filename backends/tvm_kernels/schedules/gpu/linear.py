"""Linears on a GPU: which of the kernels a spec gets, and the function that picks one by the number of rows."""

from __future__ import annotations

from typing import Any

from bitlower.backends.tvm_kernels.schedules.gpu.gemm_dp4a import emit_tiles, tile_memory
from bitlower.backends.tvm_kernels.schedules.gpu.gemm_mma import emit_matrix, has_matrix, matrix_memory
from bitlower.backends.tvm_kernels.schedules.gpu.gemv import chunk, emit_gemv
from bitlower.backends.tvm_kernels.schedules.gpu.tile import depth
from bitlower.backends.tvm_kernels.spec.base import NoKernel, kernel_name
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.target import GemmConfig
from bitlower.backends.tvm_kernels.tir.function import Buffers, function, i64, when


def refusal(spec: LinearSpec) -> str:
    """Why there is no kernel of ``spec`` for GPUs; empty if there is one."""
    if spec.layout is Layout.ROWS and depth(spec):
        return ""
    return (
        f"GPU kernels read weights in {Layout.ROWS} in groups of a multiple of 4 inputs, not {spec.layout} in "
        f"groups of {list(dict.fromkeys(spec.segment_sizes))}"
    )


def lower_linear(spec: LinearSpec, config: GemmConfig) -> Any:
    """The scheduled PrimFunc: a warp an output below ``many_rows`` rows, tiles from there on.

    Raises:
        NoKernel: the layout is not that of GPU kernels, or groups are no multiple of 4 inputs; or the blocks of the
            configuration take more shared memory than the target has.
    """
    if reason := refusal(spec):
        raise NoKernel(reason)
    many, memory = (emit_matrix, matrix_memory) if has_matrix(spec, config) else (emit_tiles, tile_memory)
    if memory(spec, config) > spec.target.shared:
        raise NoKernel(
            f"tiles of {config.block_m} x {config.block_n} results take {memory(spec, config)} bytes of shared memory,"
            f" and {spec.target} has {spec.target.shared}",
            hint="make the blocks smaller",
        )

    def body(buffers: Buffers, m: Any) -> None:
        if not chunk(spec):
            many(spec, config, buffers, m)
            return
        few = m < i64(config.many_rows)
        when(few, lambda: emit_gemv(spec, buffers, m), lambda: many(spec, config, buffers, m))

    return function(spec, body, kernel_name(spec, config))
