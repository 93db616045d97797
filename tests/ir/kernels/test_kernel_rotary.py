"""The rotary kernel against complex numbers in float64: both halves are turned by one angle."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from bitlower.ir import Granularity
from bitlower.ir.kernels.rotary import fused_rotary

_CASES = runpy.run_path(str(Path(__file__).parents[1] / "kernel_cases.py"))
GRIDS, assert_codes, assert_values, codes = (
    _CASES[name] for name in ("GRIDS", "assert_codes", "assert_values", "codes")
)
BATCH, HEADS, LENGTH, WIDTH = 2, 3, 5, 8


def angles() -> torch.Tensor:
    return torch.rand(BATCH, 1, LENGTH, WIDTH // 2, generator=torch.Generator().manual_seed(1)) * 6


def turned(x: np.ndarray) -> np.ndarray:
    pairs = x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]
    pairs = pairs * np.exp(1j * angles().numpy().astype(np.float64))
    return np.concatenate([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("as_codes", [False, True])
def test_halves_are_turned(as_codes: bool) -> None:
    x = torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    operand = codes(x, GRIDS["u8"], Granularity.per_tensor())
    arguments = operand.named("x") if as_codes else {"x": x}
    expected = turned(operand.values() if as_codes else x.numpy().astype(np.float64))
    wide = torch.cat([angles(), angles()], -1)
    scale, zero = torch.tensor(0.03), torch.tensor(128.0)
    value, taken = fused_rotary(
        **arguments, cos=wide.cos(), sin=wide.sin(), out_scale=scale, out_zero_point=zero,
        out_grid="u8 asymmetric", outputs="value codes",
    )  # fmt: skip
    assert_values(value, expected)
    assert_codes(taken, expected, scale, zero, GRIDS["u8"])


def test_shape_function() -> None:
    wide = torch.cat([angles(), angles()], -1)
    x = torch.randn(BATCH, HEADS, LENGTH, WIDTH)
    for options in ({}, {"out_grid": "s8", "outputs": "codes scale zero_point rounded"}):
        torch.library.opcheck(fused_rotary, (x, wide, wide), options, test_utils=("test_schema", "test_faketensor"))
