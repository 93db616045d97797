"""Half precision inside a float32 model: the same bits, from float32 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.passes.canonical.clean import Clean

aten = torch.ops.aten


class Slopes(nn.Module):
    """As Falcon's ALiBi: slopes in half precision times positions, whole numbers."""

    def __init__(self, dtype: torch.dtype, operator: str) -> None:
        super().__init__()
        self.dtype, self.operator = dtype, operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slopes = (torch.arange(1, 5) / 7).to(self.dtype)[None, :, None]
        positions = 300 + torch.arange(x.shape[1])[None, None]
        bias = getattr(torch, self.operator)(slopes, positions)
        return x[:, None] * bias.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["mul", "add", "sub", "div"])
def test_the_bits_are_those_of_half_precision(run, dtype: torch.dtype, operator: str) -> None:
    model, x = Slopes(dtype, operator), torch.ones(2, 9)
    cleaned = run(load(model, example_inputs={"x": x}), Clean())
    computed = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
    kinds = {node.meta["type"].dtype for node in cleaned.graph.nodes if node.target in computed}
    assert not kinds & {torch.bfloat16, torch.float16}
    for given in (x, torch.ones(3, 40)):
        assert torch.equal(cleaned(x=given)["output"], model(given))
