"""Rotary embeddings as one kernel of a fused Program (Su et al. 2021, in the form that rotates halves).

See :mod:`bitlower.ir.kernels.references` for how kernel operators read values and what they give.
"""

from __future__ import annotations

import torch

from bitlower.ir.kernels.references import like_outputs, output_tensors, read


@torch.library.custom_op("bitlower::fused_rotary", mutates_args=())
def _fused_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """``x · cos + [−x₂, x₁] · sin``, x₁ and x₂ being the halves of the last axis.

    Args:
        x: ``[batch, heads, length, head_dim]``, float32 or codes.
        cos: float32, broadcasts to x.
        sin: float32, broadcasts to x.
        x_scale: of x, rank 0.
        x_zero_point: of x.
        out_scale: of the result.
        out_zero_point: of the result.
        out_grid: the grid of the result.
        outputs: what is given: ``value``, ``codes``, ``scale``, ``zero_point``, ``rounded``.
    """
    value = read(x, x_scale, x_zero_point)
    first, second = value.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return output_tensors(value * cos + turned * sin, outputs, out_scale, out_zero_point, out_grid)


@_fused_rotary.register_fake
def _(x: torch.Tensor, *tensors: torch.Tensor | None, out_grid: str = "", outputs: str = "value") -> list[torch.Tensor]:
    return like_outputs(x, x.shape, outputs, out_grid)


fused_rotary = torch.ops.bitlower.fused_rotary.default
