"""How far outputs of an exact pass may be apart, against numpy in float64 on the whole tensor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.passes import _contracts
from bitlower.passes._contracts import RTOL, excess


def by_numpy(expected: torch.Tensor, found: torch.Tensor) -> bool:
    a, b = (tensor.double().numpy() for tensor in (expected, found))
    return bool(np.abs(a - b).max() > RTOL * (a.std() or np.abs(a).max()))


@given(
    st.integers(1, 40), st.integers(1, 7), st.floats(-1e3, 1e3), st.floats(0, 10), st.floats(0, 3 * RTOL), st.integers()
)
def test_the_tolerance_is_a_share_of_the_spread(
    count: int, part: int, mean: float, spread: float, error: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    expected = mean + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    found = expected.clone()
    found[count // 2] += error * (spread or abs(mean))
    limit = RTOL * (float(expected.numpy().std()) or abs(mean))
    if math.isclose(float((found - expected).abs().max()), limit, rel_tol=1e-6):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_contracts, "_PART", part)
        assert bool(excess(expected, found)) == by_numpy(expected, found)


def test_what_is_not_finite_must_be_so_in_both() -> None:
    expected = torch.tensor([1.0, math.inf, 2.0])
    assert not excess(expected, expected.clone())
    assert excess(expected, torch.tensor([1.0, 3.0, 2.0])) == "NaN or Inf"
    assert excess(torch.ones(3), torch.tensor([1.0, 1.0, math.nan])) == "NaN or Inf"
    assert not excess(torch.zeros(0), torch.zeros(0))
    assert excess(torch.zeros(3), torch.full((3,), 1e-9))
