import torch

from bitlower.backends.checkpoint._outputs import OutputComparison


def test_the_rounding_of_a_constant_output_is_no_spread() -> None:
    """0.1 is no float32: its sums leave a variance of rounding errors, which nothing may be measured by."""
    constant = torch.full((1000,), 0.1)
    comparison = OutputComparison(["y"])
    comparison.add({"y": constant}, {"y": constant}, {"y": constant * (1 + 1e-6)})
    (row,) = comparison.rows()
    assert abs(row.given_weights - 1e-6) < 2e-7
