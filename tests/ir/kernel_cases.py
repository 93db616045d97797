"""What kernel operators compute, in numpy and float64, written from their descriptions; and operands to try them on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import erf, expit

from bitlower.ir import Granularity, Grid
from bitlower.ir.quantization import numerics

GRIDS = {"u8": Grid(8, signed=False, symmetric=False), "s8": Grid(8), "s4": Grid(4), "u4": Grid(4, False, False)}


class Codes(NamedTuple):
    """Codes with their scale and zero point."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def values(self) -> np.ndarray:
        codes, scale, zero = (part.numpy().astype(np.float64) for part in self)
        return (codes - spread(zero, codes.shape)) * spread(scale, codes.shape)

    def named(self, name: str) -> dict[str, torch.Tensor]:
        return {name: self.codes, f"{name}_scale": self.scale, f"{name}_zero_point": self.zero_point}


def codes(x: torch.Tensor, grid: Grid, granularity: Granularity) -> Codes:
    scale, zero = grid.qparams(*granularity.range_of(x))
    return Codes(numerics.codes(x, scale, zero, grid.quant_min, grid.quant_max).to(grid.dtype), scale, zero)


def spread(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis in range(part.ndim):
        part = np.repeat(part, shape[axis] // part.shape[axis], axis)
    return part


def activation(name: str, y: np.ndarray) -> np.ndarray:
    return {
        "": lambda: y,
        "relu": lambda: np.maximum(y, 0),
        "gelu": lambda: 0.5 * y * (1 + erf(y / np.sqrt(2))),
        "gelu-tanh": lambda: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
        "silu": lambda: y * expit(y),
        "tanh": lambda: np.tanh(y),
        "sigmoid": lambda: expit(y),
    }[name]()


def rounded(y: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    """The values of the codes of ``y``."""
    scale, zero = spread(scale, y.shape), spread(zero, y.shape)
    return (np.clip(np.rint(y / scale) + zero, grid.quant_min, grid.quant_max) - zero) * scale


def assert_codes(found: torch.Tensor, y: np.ndarray, scale: Any, zero: Any, grid: Grid) -> None:
    """``found`` are the codes of ``y``: at most half a step away, and a little for float32."""
    scale, zero = (np.asarray(part, np.float64) for part in (scale, zero))
    ratio = np.clip(y / spread(scale, y.shape) + spread(zero, y.shape), grid.quant_min, grid.quant_max)
    assert found.dtype == grid.dtype
    assert np.abs(found.numpy() - ratio).max() <= 0.5 + 1e-3


def assert_values(found: torch.Tensor, y: np.ndarray) -> None:
    assert found.dtype == torch.float32
    assert tuple(found.shape) == y.shape
    assert np.abs(found.detach().numpy() - y).max() <= 1e-5 * max(1.0, np.abs(y).max())
