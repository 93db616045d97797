"""Convolutions have quantizers of their own kind, and passes that reason about linears leave them alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program, get_tensor, ops
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.quantizers.quantize import PlacementReport


class Encoder(nn.Module):
    """A depthwise and a dense convolution over ``x`` [batch, 8, length], then a residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(8, 8, 5, padding=2, groups=8)
        self.dense = nn.Conv1d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(nn.functional.gelu(self.depthwise(x))).transpose(1, 2)
        return y + self.down(nn.functional.gelu(self.up(self.norm(y))))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return load(Encoder().eval(), example_inputs={"x": torch.randn(2, 8, 12)})


def data(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 8, 12, generator=generator)} for _ in range(count)]


def passed(program: Program, passes: str, context: Context | None = None) -> Program:
    return PassManager(parse_pipeline(passes)).run(program, context or Context(data(), data(1)))


def kernels(program: Program) -> dict[str, QuantizerNode]:
    return {
        quantizer.tensor: QuantizerNode(node)
        for node, quantizer in program.quantizers()
        if quantizer.role == "convolution-weight"
    }


def test_weights_have_a_scale_an_output_channel_and_inputs_one(program: Program) -> None:
    result = passed(program, "clean,quantize{scheme=W8A8},calibrate{weights=minmax activations=minmax}")
    assert set(kernels(result)) == {"depthwise.weight", "dense.weight"}
    for name, view in kernels(result).items():
        weight = get_tensor(program.module, name).detach().double()
        scale, zero = view.range(result.module)
        expected = weight.abs().flatten(1).amax(1) / 127
        assert scale.shape == (len(weight), 1, 1)
        torch.testing.assert_close(scale.flatten().double(), expected, rtol=1e-6, atol=0)
        assert not zero.any()
    inputs = [QuantizerNode(n) for n, q in result.quantizers() if q.role == "convolution-input"]
    assert [view.scale.meta["type"].shape for view in inputs] == [(), ()]
    low, high = (float(f(torch.cat([batch["x"] for batch in data()]))) for f in (torch.min, torch.max))
    scale, zero = inputs[0].range(result.module)
    assert float(scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert float(zero) == round(-low / float(scale))


def test_the_simulated_program_is_torch_on_rounded_values(program: Program) -> None:
    result = passed(program, "clean,quantize{scheme=W8A8 targets=[depthwise dense]},calibrate")
    module = Encoder()
    module.load_state_dict({name.removeprefix("model/"): t for name, t in program.tensors()})
    x, inputs = data(1)[0]["x"], []
    for node, quantizer in result.quantizers():
        view = QuantizerNode(node)
        scale, zero = (part.double() for part in view.range(result.module))
        low, high = quantizer.spec.grid.quant_min, quantizer.spec.grid.quant_max

        def rounded(value, scale=scale, zero=zero, low=low, high=high):
            return ((value.double() / scale).round().add(zero).clamp(low, high) - zero) * scale

        if view.rounds_parameter:
            module.get_parameter(quantizer.tensor).data = rounded(module.get_parameter(quantizer.tensor).data)
        else:
            inputs.append(rounded)
    module.double()
    for layer, round_input in zip((module.depthwise, module.dense), inputs, strict=True):
        layer.register_forward_pre_hook(lambda _, args, round_input=round_input: (round_input(args[0]),))
    torch.testing.assert_close(result(x=x)["output"].double(), module(x.double()), rtol=1e-4, atol=1e-4)
    off = (result(x=x)["output"] - program(x=x)["output"]).abs()
    assert 0 < off.max() < 0.1


def test_lowering_changes_no_bit(program: Program) -> None:
    simulated = passed(program, "clean,quantize{scheme=W8A8},calibrate")
    lowered = passed(simulated, "lower-integer")
    assert get_tensor(lowered.module, "dense.weight_codes").dtype == torch.int8
    assert {node.target for node, _ in lowered.quantizers()} == {ops.quantize, ops.dequantize}
    assert torch.equal(lowered(**data(1)[0])["output"], simulated(**data(1)[0])["output"])


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("W4A16-g8", "the kernel of a convolution has a scale an output channel, and not per-group(8)"),
        ("W8A8-token", "the input of a convolution has one scale, and not per-token"),
    ],
)
def test_other_granularities_leave_convolutions_in_float(program: Program, scheme: str, reason: str) -> None:
    context = Context(data(), data(1))
    result = passed(program, f"clean,quantize{{scheme={scheme}}}", context)
    assert not kernels(result)
    rows = [row for row in context.results[PlacementReport].rows if row.role.startswith("convolution")]
    assert {(row.spec, row.reason) for row in rows} == {("", reason)}
    assert {row.tensor for row in rows} >= {"depthwise.weight", "dense.weight"}
    assert {q.role for _, q in result.quantizers()} >= {"linear-weight"}


def test_weights_alone_have_a_scale_an_output_channel(program: Program) -> None:
    result = passed(program, "clean,quantize{scheme=W8A16}")
    assert {str(view.spec.granularity) for view in kernels(result).values()} == {"per-channel(0)"}
    assert all(QuantizerNode(node).rounds_parameter for node, _ in result.quantizers())


def test_patterns_choose_convolutions_by_their_paths(program: Program) -> None:
    result = passed(program, "clean,quantize{scheme=W8A8 ignore=[depthwise]}")
    assert set(kernels(result)) == {"dense.weight"}
    assert [q.tensor for _, q in result.quantizers()].count("x") == 0


@pytest.mark.parametrize(
    "passes",
    [
        "quantize{scheme=W8A8},smooth,calibrate",
        "quantize{scheme=W8A8},gptq,calibrate",
        "quantize{scheme=W8A16},rtn",
        "quantize{scheme=W8A16},adaround{iterations=4}",
        "quantize{scheme=W8A8},calibrate,correct-bias",
        "analyze-outliers,peg-permute{groups=4},quantize{scheme=W8A8-peg4},calibrate,legalize",
        "quantize{scheme=W8A8},assign-precision{weight-bits=8 activation-bits=8},calibrate,analyze-sensitivity",
    ],
)
def test_passes_over_linears_leave_them_alone(program: Program, passes: str) -> None:
    result = passed(program, f"clean,{passes},lower-integer")
    plain = passed(program, "clean,quantize{scheme=W8A16},rtn,lower-integer")
    assert set(kernels(result)) == {"depthwise.weight", "dense.weight"}
    for name in kernels(result):
        codes, expected = (get_tensor(p.module, f"{name}_codes").int() for p in (result, plain))
        assert (codes - expected).abs().max() <= 2
    difference = result(**data(1)[0])["output"] - program(**data(1)[0])["output"]
    assert difference.abs().max() < 0.2


def test_scales_of_kernels_can_be_trained(program: Program) -> None:
    simulated = passed(program, "clean,quantize{scheme=W8A8},calibrate")
    module = simulated.trainable_module()
    module(**data(1)[0])["output"].square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if "dense" in name and p.grad is not None}
    assert any(gradient.shape == (16, 1, 1) for gradient in gradients.values())
    assert any(gradient.shape == (16, 8, 3) for gradient in gradients.values())
