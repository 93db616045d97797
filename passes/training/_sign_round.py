"""A weight whose rounding and range are learned by the sign of the gradient (SignRound, Cheng et al. 2023, §3)."""

from __future__ import annotations

import torch
from torch import nn

from bitlower.ir import QuantSpec
from bitlower.ir.learnable import Groups
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.rounding import Clipping, round_to_grid

SHIFT = 0.5
"""V lies in ±SHIFT: a code moves by one at most."""
SMALLEST = 0.5
"""The clip factors lie in [SMALLEST, 1]."""


class SignRound(nn.Module):
    """``Ŵ = s · (clamp(round(W / s + V) + z, quant_min, quant_max) − z)`` with ``V`` and the ends of ``s`` learned.

    ``shift`` is V, of the shape of the weight. ``high`` and ``low`` are the clip factors α and β of each group, by
    which the ends of its range are multiplied; a symmetric grid has one, ``high``. Gradients pass straight through
    rounding, that of zero points too. At the start this is rounding to nearest on the grid that was given.

    Args:
        spec: grid and granularity of the weight.
        weight: float32, of any shape.
        scale: in the shape that is stored, above zero.
        zero_point: the same.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, spec: QuantSpec, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__()
        grid = spec.grid
        self.clipping = Clipping(grid.quant_min, grid.quant_max, after_rounding=True)
        self.groups = Groups.of(spec.granularity, scale, zero_point, weight)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.shift = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        entries = self.groups.take(self.scale)
        self.high = nn.Parameter(torch.ones_like(entries))
        if not grid.symmetric:
            self.low = nn.Parameter(torch.ones_like(entries))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight on its grid."""
        scale, zero = self._range()
        return round_to_grid(self._shifted(weight, scale), scale, zero, self.clipping)

    def update(self, rate: float) -> None:
        """A step of this length against the sign of each gradient, within the bounds."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=rate)
                low, high = (-SHIFT, SHIFT) if name == "shift" else (SMALLEST, 1.0)
                parameter.clamp_(low, high)

    def rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight on its grid, scale and zero point, as they are now."""
        with torch.no_grad():
            scale, zero = self._range()
            return self(weight), scale.clone(), zero.round()

    def _shifted(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return weight + numerics.blockwise(self.shift, scale, scale, lambda v, s, _: v * s)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, in the shape that is stored; the zero point is not rounded."""
        high = self.groups.spread(self.high)
        if not hasattr(self, "low"):
            return self.scale * high, self.zero_point
        low = self.groups.spread(self.low)
        below, above = self.zero_point - self.clipping.quant_min, self.clipping.quant_max - self.zero_point
        ratio = (high * above + low * below) / (above + below)
        return self.scale * ratio, self.clipping.quant_min + below * low / ratio
