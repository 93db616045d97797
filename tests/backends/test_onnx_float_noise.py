"""What float arithmetic explains, against the bound it stands for, and in a verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from bitlower.backends.artifact.rounding import TIE, Rounding
from bitlower.backends.onnx_qdq import export
from bitlower.backends.onnx_qdq.verify.compare import verify_export
from bitlower.backends.onnx_qdq.verify.tally import Tally
from bitlower.frontends import load
from bitlower.ir import CheckError, Program, float_noise
from bitlower.ir.float_noise import ROUNDING, shaken, values_given
from bitlower.ir.operators import argument
from bitlower.passes import Context, PassManager, parse_pipeline


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"input": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def program(batch) -> Program:
    """Two linears with biases, their weights in 4 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    passes = parse_pipeline("clean,quantize{scheme=W4A16-g16},rtn,lower-integer")
    return PassManager(passes).run(load(model, example_inputs=batch), Context())


def test_results_of_a_linear_move_by_a_rounding_of_the_largest(batch) -> None:
    linear = nn.Linear(32, 16, bias=False)
    program = load(linear.eval(), example_inputs=batch)
    (name,) = (spec.name for spec in program.outputs)
    y = batch["input"].double() @ linear.weight.detach().double().T
    off = (shaken(program, batch)[name].double() - y).abs() / (ROUNDING * y.abs().amax(-1, keepdim=True))
    assert 0.5 < float(off.max()) < 2.5  # float32 itself rounds too
    assert float(off.mean()) == pytest.approx(0.5, abs=0.2)


def test_where_large_values_cancel_the_noise_is_large(batch) -> None:
    """The same function of x, once by way of values that are 10⁴ times as large."""

    class Cancelling(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.linear, self.size = nn.Linear(32, 2, bias=False), size
            nn.init.ones_(self.linear.weight)
            self.linear.weight.data[1, 0] += 1 / size

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            y = self.linear(input * self.size)
            return y[:, 1] - y[:, 0]

    spreads = []
    for size in (1.0, 1e4):
        program = load(Cancelling(size).eval(), example_inputs=batch)
        (name,) = (spec.name for spec in program.outputs)
        value = batch["input"][:, 0].double()
        spreads.append(float((shaken(program, batch)[name].double() - value).abs().max() / value.std()))
    assert spreads[1] > 1000 * spreads[0]


def test_a_value_that_is_two_outputs_is_given_by_both_names(batch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 4)

        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.linear(input)
            return y, y

    program = load(Twice().eval(), example_inputs=batch)
    found = shaken(program, batch)
    assert list(found) == [spec.name for spec in program.outputs]
    assert len(found) == 2


def _with_another_bias(folder: Path, share: float) -> None:
    """The last bias is off by ``share``."""
    model = onnx.load(folder / "model.onnx")
    bias = next(t for t in model.graph.initializer if t.name == "2.weight_bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(share), bias.name))
    onnx.save(model, folder / "model.onnx")


def test_a_verification_allows_for_the_noise_and_for_no_more(
    program: Program, batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(program, tmp_path, batches=[batch])
    _with_another_bias(tmp_path, 1e-3)
    config = {"session.qdq_matmulnbits_accuracy_level": "0"}
    with pytest.raises(CheckError, match=r"standard deviations off, where float arithmetic explains 0\.0002"):
        verify_export(program, tmp_path, [batch], session_config=config)
    monkeypatch.setattr(float_noise, "ROUNDING", 1e-2)
    assert verify_export(program, tmp_path, [batch], session_config=config).outputs[0].given_codes > 2e-4


def test_noise_of_a_value_widens_its_tie_up_to_a_quarter_of_a_step() -> None:
    x, scale, zero = torch.tensor([1.0, 2.0]), torch.tensor(0.1), torch.tensor(0.0)
    tally, plain = Tally(steps=255), Rounding(x, scale, zero, -128, 127)
    assert tally.tie == pytest.approx(TIE * 255)
    tally.add_noise(plain, Rounding(x + torch.tensor([0.001, 0.002]), scale, zero, -128, 127))
    assert tally.tie == pytest.approx(4 * 0.02, rel=1e-4)
    tally.add_noise(plain, Rounding(x - 0.1, scale, zero, -128, 127))
    assert tally.tie == 0.25


def test_values_go_on_from_those_that_are_known(program: Program, batch: dict[str, torch.Tensor]) -> None:
    linears = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    replaced = torch.ones(8, 64)
    values = values_given(program, batch, linears, {linears[0]: replaced})
    assert torch.equal(values[linears[0]], replaced)
    weight, bias = (argument(linears[1], name) for name in ("weight", "bias"))
    parts = values_given(program, batch, [weight, bias])
    expected = torch.ones(8, 64, dtype=torch.float64) @ parts[weight].double().T + parts[bias].double()
    assert torch.allclose(values[linears[1]].double(), expected, atol=1e-5)
