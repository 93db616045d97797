"""Kernel operators: what each reads, rounds and returns, and what it computes, in PyTorch."""

from bitlower.ir.kernels.attention import fused_attention
from bitlower.ir.kernels.description import (
    KERNELS,
    OPERANDS,
    OUTPUTS,
    ROUNDINGS,
    Output,
    arguments,
    bind,
    is_kernel,
    kind,
    output_of,
    outputs,
    read_outputs,
)
from bitlower.ir.kernels.references import fused_embedding, fused_linear, fused_norm, fused_pointwise
from bitlower.ir.kernels.rotary import fused_rotary

__all__ = [
    "KERNELS",
    "OPERANDS",
    "OUTPUTS",
    "ROUNDINGS",
    "Output",
    "arguments",
    "bind",
    "fused_attention",
    "fused_embedding",
    "fused_linear",
    "fused_norm",
    "fused_pointwise",
    "fused_rotary",
    "is_kernel",
    "kind",
    "output_of",
    "outputs",
    "read_outputs",
]
