"""Quantized convolutions as ONNX: the runtime multiplies their codes, and gives what torch gives in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import bitlower
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.backends.onnx_qdq.runtime.session import read_model
from bitlower.backends.onnx_qdq.translate.unfold import MOST_PLACES
from bitlower.backends.onnx_qdq.verify.constants import check_constants
from bitlower.frontends import load
from bitlower.ir import Batch, Program, get_tensor
from bitlower.passes import Context, PassManager, parse_pipeline


class Stack(nn.Module):
    """Layers over ``x``, and a linear layer over the channels of what they give."""

    def __init__(self, *layers: nn.Module, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).flatten(2).transpose(1, 2))


def sound() -> tuple[nn.Module, list[Batch]]:
    """As Whisper's encoder begins: width 3, the second with stride 2."""
    layers = nn.Conv1d(6, 8, 3, padding=1), nn.GELU(), nn.Conv1d(8, 10, 3, stride=2, padding=1), nn.GELU()
    return Stack(*layers, channels=10), [{"x": torch.randn(3, 6, 20)} for _ in range(2)]


def picture() -> tuple[nn.Module, list[Batch]]:
    """Kernels, strides, gaps and paddings that differ from axis to axis; the last pads one side alone more."""
    layers = (
        nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), nn.GELU(),
        nn.Conv2d(8, 10, (2, 3), padding="same", bias=False),
    )  # fmt: skip
    return Stack(*layers, channels=10), [{"x": torch.randn(2, 3, 12, 11)} for _ in range(2)]


def lowered(module: nn.Module, batches: list[Batch], scheme: str) -> Program:
    program = load(module.eval(), example_inputs=dict(batches[0]))
    passes = f"clean,quantize{{scheme={scheme}}},calibrate,lower-integer"
    return PassManager(parse_pipeline(passes)).run(program, Context(batches, batches))


def in_float64(program: Program, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layers on rounded values, by torch's own convolutions: weights and inputs as the quantizers say."""

    def rounded(x: torch.Tensor, name: str, codes: torch.Tensor | None = None) -> torch.Tensor:
        scale, zero = (get_tensor(program.module, f"quantizers.{name}.{p}").double() for p in ("scale", "zero_point"))
        codes = torch.clamp(torch.round(x.double() / scale) + zero, 0, 255) if codes is None else codes.double()
        return (codes - zero) * scale

    names = [q.tensor for node, q in program.quantizers() if node.op == "call_function" and q.role.endswith("-input")]
    inputs = iter(dict.fromkeys(names))
    for name, layer in module.layers.named_children():
        if not isinstance(layer, nn.modules.conv._ConvNd):
            x = layer(x)
            continue
        stem = f"layers_{name}_weight"
        codes = get_tensor(program.module, f"layers.{name}.weight_codes")
        layer.double().weight.data = rounded(codes, stem, codes)
        x = layer(rounded(x, next(inputs)))
    codes = get_tensor(program.module, "head.weight_codes")
    module.head.double().weight.data = rounded(codes, "head_weight", codes)
    return module.head(rounded(x.flatten(2).transpose(1, 2), next(inputs)))


@pytest.mark.parametrize(("make", "form"), [(sound, "qdq"), (sound, "onnxruntime"), (picture, "qdq")])
def test_codes_are_multiplied_as_integers(make, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = make()
    program = lowered(module, batches, "W8A8")
    report = OnnxQdq(form=form).export(program, tmp_path, batches)
    kernels = report.verification.kernels
    assert (kernels.expected, kernels.found, kernels.floating) == (3, 3, {})
    [row] = report.verification.outputs
    assert row.given_codes < 1e-5
    x = batches[0]["x"]
    ours = bitlower.load(tmp_path)(x=x)["output"].double()
    exact = in_float64(program, module, x)
    off = (ours - exact).abs() / exact.std()
    assert (off < 0.02).all()  # a code at a tie may turn
    assert off.mean() < 1e-3


@pytest.mark.parametrize("scheme", ["W4A8-tensor", "W8A8-asym", "W8A8-full"])
def test_other_schemes_are_verified_too(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = sound()
    kernels = OnnxQdq().export(lowered(module, batches, scheme), tmp_path, batches).verification.kernels
    assert kernels.found == kernels.expected == (2 if scheme == "W8A8-full" else 3)
    assert kernels.floating == ({"Conv": 1} if scheme == "W8A8-full" else {})


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), "a convolution runs in groups of channels"),
        (nn.Conv2d(6, 6, 6, padding=1), f"the kernel of a convolution has more than {MOST_PLACES} places"),
    ],
)
def test_what_is_faster_in_float_computes_with_rounded_values(layer: nn.Module, reason: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = Stack(layer, nn.GELU(), channels=6), [{"x": torch.randn(2, 6, 9, 8)}]
    program = lowered(module, batches, "W8A8")
    report = OnnxQdq().export(program, tmp_path, batches)
    kernels = report.verification.kernels
    assert (kernels.found, kernels.floating, kernels.float_reasons) == (1, {"Conv": 1}, {reason: 1})
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    codes = get_tensor(program.module, "layers.0.weight_codes").numpy()
    np.testing.assert_array_equal(stored["layers.0.weight_codes"], codes)
    assert report.verification.outputs[0].given_codes < 1e-5


def test_weights_alone_may_have_a_scale_a_channel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = sound()
    kernels = OnnxQdq().export(lowered(module, batches, "W8A16"), tmp_path, batches).verification.kernels
    assert (kernels.floating["Conv"], kernels.float_reasons["an operand is float"]) == (2, 3)


def test_other_constants_are_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batches = sound()
    program = lowered(module, batches, "W8A8")
    OnnxQdq().export(program, tmp_path, batches)
    model = read_model(tmp_path / "model.onnx")
    assert check_constants(program, model).problems == ()
    for name, problem in (
        ("layers.2.weight_codes", "of the 240 codes of layers.2.weight_codes are not the program's"),
        ("quantizers.layers_2_weight.scale", "the scale of layers.2.weight_codes is not the program's"),
        ("quantizers.x.scale", "the scale of quantize_default at DequantizeLinear is not the program's"),
    ):
        tensor = get_tensor(program.module, name)
        before = tensor.clone()
        tensor += torch.ones(()).to(tensor.dtype)
        assert any(problem in line for line in check_constants(program, model).problems)
        tensor.copy_(before)


class Patches(nn.Module):
    """Patches of pictures of 8 × 8, as vision transformers embed them."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 10, 4, stride=4)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != (8, 8):
            raise ValueError("pictures of another size")
        return self.head(self.projection(x).flatten(2).transpose(1, 2))


def test_a_patch_embedding_is_a_linear_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(2, 3, 8, 8)}]
    program = lowered(Patches(), batches, "W8A8")
    assert get_tensor(program.module, "projection.weight_codes").shape == (10, 48)
    kernels = OnnxQdq().export(program, tmp_path, batches).verification.kernels
    assert (kernels.found, kernels.expected, kernels.floating) == (2, 2, {})
