"""Whether a code is what a value rounds to."""

import pytest
import torch

from bitlower.backends.artifact.rounding import Rounding


def test_excess_is_the_distance_from_the_rounding_interval():
    scale, zero = torch.tensor(0.5), torch.tensor(3.0)
    x = torch.tensor([0.0, 0.25, 0.3, -10.0, 500.0])
    rounding = Rounding(x, scale, zero, 0, 255)
    assert rounding.excess(torch.tensor([3, 3, 4, 0, 255])) == 0
    assert rounding.excess(torch.tensor([3, 4, 4, 0, 255])) == 0
    assert rounding.excess(torch.tensor([3, 3, 3, 0, 255])) == pytest.approx(0.1, abs=1e-6)
    assert rounding.excess(torch.tensor([5, 3, 4, 0, 255])) == pytest.approx(1.5, abs=1e-6)
    assert rounding.excess(torch.tensor([3, 3, 4, 0, 254])) == pytest.approx(1003 - 254.5)
