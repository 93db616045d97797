"""What a quantizer node stands for."""

from __future__ import annotations

from dataclasses import dataclass

from bitlower.ir.quantization.scheme import QuantSpec


@dataclass(frozen=True)
class Quantizer:
    """What a ``fake_quantize``, ``quantize`` or ``dequantize`` node stands for; it lies in ``node.meta["quantizer"]``.

    Kernels have several, by operand, in ``node.meta["quantizers"]``.

    Args:
        role: one of :data:`~bitlower.ir.quantization.scheme.WEIGHT_ROLES` or
            :data:`~bitlower.ir.quantization.scheme.ACTIVATION_ROLES`.
        spec: grid and granularity.
        tensor: what is quantized: a parameter's name, or that of the node whose value it is.
    """

    role: str
    spec: QuantSpec
    tensor: str
