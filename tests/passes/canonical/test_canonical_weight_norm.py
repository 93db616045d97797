"""Weights that are stored as a direction and a length, multiplied out: by each of torch's two ways to store them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program, get_tensor
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean, CleanReport


class Positions(nn.Module):
    """A convolution whose weight has a length for each of its places, as wav2vec 2.0's has."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        conv = nn.Conv1d(6, 6, 4, padding=2, groups=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about its older way
            normed = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
            self.conv = normed(conv, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def cleaned(program: Program) -> Program:
    context = Context()
    Clean().run(program, context)
    program.recompile()
    assert context[CleanReport].misses == () or all("weight" not in miss.rule for miss in context[CleanReport].misses)
    return program


@pytest.mark.parametrize("old", [False, True])
def test_the_weight_has_its_plain_name_and_the_value_of_the_paper(old: bool) -> None:
    torch.manual_seed(0)
    model = Positions(old).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    names = ("weight_g", "weight_v") if old else ("original0", "original1")
    holder = model.conv if old else model.conv.parametrizations.weight
    length, direction = (getattr(holder, name).detach().double().numpy() for name in names)
    expected = length * direction / np.sqrt((direction**2).sum((0, 1), keepdims=True))
    x = torch.randn(3, 6, 9)
    program = cleaned(load(model, example_inputs={"x": x}))
    stored = [str(node.target) for node in program.graph.find_nodes(op="get_attr")]
    assert sorted(stored) == ["conv.bias", "conv.weight"]
    np.testing.assert_allclose(get_tensor(program.module, "conv.weight").detach().numpy(), expected, rtol=1e-5)
    assert torch.equal(program(x=x)["output"], model(x))


def test_what_is_computed_from_an_input_stays() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            return torch._weight_norm(x, g, 0)

    program = load(Scaled(), example_inputs={"x": torch.randn(3, 4), "g": torch.ones(3, 1)})
    context = Context()
    Clean().run(program, context)
    assert [miss.reason for miss in context[CleanReport].misses] == ["its direction or its length is no stored tensor"]
