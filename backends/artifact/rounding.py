"""Whether codes are what values round to, but for ties that float arithmetic turns over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitlower.ir.quantization import numerics

TIE = 2e-5
"""How far from a rounding interval a value may lie, as a part of the quantizer's range (0.005 steps of 8 bits)."""


@dataclass(frozen=True)
class Rounding:
    """What codes are made of: a value, its scale and zero point, and the limits of the grid."""

    x: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int

    def codes(self) -> torch.Tensor:
        """What the value rounds to, whole numbers in float32."""
        return numerics.codes(self.x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def position(self) -> torch.Tensor:
        """Where the value lies on the grid, in steps, float64."""
        parts = (self.x.double(), self.scale.double(), self.zero_point.double())
        return numerics.blockwise(*parts, lambda x, s, z: x / s + z)

    def excess(self, codes: torch.Tensor) -> float:
        """The largest distance of a value from the interval that rounds to its code, in steps; in float64."""
        return float(self.distances(codes).max()) if codes.numel() else 0.0

    def distances(self, codes: torch.Tensor) -> torch.Tensor:
        """Those of all values; 0 within the interval."""
        away = self.position() - codes
        away = torch.where((codes <= self.quant_min) & (away < 0), 0.0, away)
        away = torch.where((codes >= self.quant_max) & (away > 0), 0.0, away)
        return (away.abs() - 0.5).clamp(min=0)
