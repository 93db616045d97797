"""Embedding groups that calibration chooses, with every estimator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Batch, Granularity, Program, Scheme, get_tensor
from bitlower.ir.quantization import numerics
from bitlower.passes import Context
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


def scales(program: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero point of each quantizer, by its node's name."""
    return {
        node.name: (get_tensor(program.module, node.args[1].target), get_tensor(program.module, node.args[2].target))
        for node, _ in program.quantizers()
    }


def along_embedding(run, program: Program, granularity: Granularity, data: list[Batch], estimator: str) -> Program:
    """``program`` with its linear inputs quantized so."""
    scheme = Scheme.parse("W16A8")
    scheme = replace(scheme, activations=replace(scheme.activations, granularity=granularity))
    return run(program, Quantize(scheme), Calibrate(activations=estimator), context=Context(calibration=data))


@pytest.mark.parametrize("estimator", ["minmax", "running-minmax", "percentile", "mse", "mse-golden", "mse-token"])
def test_one_chosen_group_is_per_tensor(bert, batches, run, estimator: str) -> None:
    _, program = bert()
    data = batches(2)
    chosen = along_embedding(run, program, Granularity.per_embedding_parts(1), data, estimator)
    tensor = along_embedding(run, program, Granularity.per_tensor(), data, estimator)
    expected = scales(tensor)
    for key, (scale, zero) in scales(chosen).items():
        torch.testing.assert_close(scale, expected[key][0].expand_as(scale), atol=0, rtol=1e-6)
        assert torch.equal(zero, expected[key][1].expand_as(zero))
    values = [program_(**data[1])["logits"] for program_ in (chosen, tensor)]
    if estimator == "minmax":
        assert torch.equal(*values)


@pytest.mark.parametrize("estimator", ["minmax", "running-minmax", "percentile", "mse-token"])
def test_a_chosen_group_for_each_index_is_per_embedding(bert, batches, run, estimator: str) -> None:
    _, program = bert()
    data = batches(2)
    chosen = along_embedding(run, program, Granularity.per_embedding_parts(64), data, estimator)
    each = along_embedding(run, program, Granularity.per_embedding(), data, estimator)
    expected = scales(each)
    for key, (scale, zero) in scales(chosen).items():
        assert torch.equal(scale, expected[key][0])
        assert torch.equal(zero, expected[key][1])
    assert torch.equal(chosen(**data[1])["logits"], each(**data[1])["logits"])


@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse", "mse-token"])
def test_chosen_groups_hold_outliers_apart(estimator: str, run) -> None:
    """Three dimensions of 30 times the range, side by side: they get a scale of their own, and the error falls."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widths = nn.Parameter(torch.ones(24).index_fill(0, torch.tensor([9, 10, 11]), 30.0))
            self.up = nn.Linear(24, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x * self.widths)

    data = [{"x": torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    program = load(Scaled(), example_inputs=data[0])
    made = {}
    for granularity in (Granularity.per_embedding_parts(3), Granularity.per_tensor()):
        result = along_embedding(run, program, granularity, data, estimator)
        x = data[0]["x"] * torch.ones(24).index_fill(0, torch.tensor([9, 10, 11]), 30.0)
        [node] = [n for n, _ in result.quantizers()]
        parts = [get_tensor(result.module, str(arg.target)) for arg in node.args[1:3]]
        made[granularity.kind] = float((numerics.fake(x, *parts, 0, 255) - x).square().mean()), parts[0]
    error, scale = made["embedding-parts"]
    assert [len(set(part.tolist())) for part in scale.reshape(-1).split([9, 3, 12])] == [1, 1, 1]
    assert float(scale.max()) > 10 * float(scale.min())
    assert error < 0.5 * made["tensor"][0]
