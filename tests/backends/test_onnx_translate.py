"""Translations of single operators, in onnxruntime against torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.translate import torchlib
from bitlower.backends.onnx_qdq.translate.translator import translate
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program


class Differences(nn.Module):
    """A number minus a tensor, in all ways that a model may write it."""

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return 1.0 - mask, 1 - mask, torch.rsub(mask, 1.5, alpha=3), 2 - x, torch.rsub(x, 0.5, alpha=-2)


@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
def test_a_number_minus_a_tensor_of_any_type_keeps_value_and_type(form: str) -> None:
    inputs = {"mask": torch.tensor([[1, 0, 7], [0, 1, 1]]), "x": torch.randn(2, 3)}
    model, _ = lower(load(Differences(), example_inputs=inputs), opset=21, form=form)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(found, Differences()(**inputs), strict=True):
        assert ours.dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours, theirs.numpy())


class Computed(nn.Module):
    """``function`` of whole numbers, of a mask and of numbers, all ``[batch, sequence]``."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, whole: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> object:
        return self.function(whole, mask, x)


def inputs(rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    whole = torch.randint(-4, 9, (rows, length), generator=generator)
    return {"whole": whole, "mask": whole > 1, "x": torch.randn(rows, length, generator=generator)}


def check(function: Callable[..., object], opset: int = 23) -> Program:
    """Values and dtypes of the ONNX graph are torch's, at the size that was traced and at another."""
    program = load(Computed(function), example_inputs=inputs())
    model, _ = lower(program, opset=opset, form="qdq")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in ((3, 6), (5, 10)):
        given = inputs(*sizes)
        taken = {value.name: given[value.name].numpy() for value in session.get_inputs()}
        wanted = function(**given)
        for ours, theirs in zip(
            session.run(None, taken), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
        ):
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)
    return program


@pytest.mark.parametrize(
    "function",
    [
        lambda whole, mask, x: (whole + x, x * mask, whole * mask, x - whole),
        lambda whole, mask, x: (whole * 0.5, whole + 2, mask * 3, mask + 1.5),
        lambda whole, mask, x: (whole / 2, whole / whole.clamp(min=1), torch.multiply(whole, x)),
        lambda whole, mask, x: (whole > x, whole == 1.0, x < 2, whole >= mask, torch.greater(whole, x)),
        lambda whole, mask, x: (torch.where(mask, whole, x), torch.where(mask, 1.0, whole), x.masked_fill(mask, 0)),
        lambda whole, mask, x: (torch.cat([whole, x], 1), torch.stack([mask, whole])),
        lambda whole, mask, x: (mask.sum(1), mask.cumsum(1), whole.sum(), mask.sum((0, 1))),
        lambda whole, mask, x: (torch.exp(whole), torch.sigmoid(mask), torch.pow(2, x), whole**2, x**whole.abs()),
        lambda whole, mask, x: (torch.logical_and(whole, mask), torch.logical_not(whole), mask & (x > 0)),
        lambda whole, mask, x: (torch.maximum(whole, x), torch.max(x, whole), torch.min(whole, whole + 1)),
        lambda whole, mask, x: (x + torch.tensor(2), whole + torch.tensor(0.5), x * x.shape[1], whole // 2),
    ],
)  # fmt: skip
def test_operands_are_promoted_as_torch_promotes_them(function: Callable[..., object]) -> None:
    check(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda whole, mask, x: torch.square(x),
        lambda whole, mask, x: torch.logaddexp(x, x * 2),
        lambda whole, mask, x: (x.reshape_as(whole), x.T, torch.fliplr(x)),
        lambda whole, mask, x: torch.aminmax(x, dim=1),
        lambda whole, mask, x: torch.eye(x.shape[1]) * x.sum(),
        lambda whole, mask, x: torch.rot90(x + 1),
        lambda whole, mask, x: whole.reshape(x.shape[1], x.shape[0]).expand(2, x.shape[1], x.shape[0]),
    ],
)
def test_operators_without_a_translation_are_decomposed(function: Callable[..., object]) -> None:
    check(function)


def test_of_several_axes_those_of_size_1_go() -> None:
    check(lambda whole, mask, x: (x[:, None, None].squeeze((1, 2)), x[:, None].squeeze((1, 2)), x.squeeze((0, 1))))


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_operators_of_earlier_opsets_are_brought_to_the_models(opset: int) -> None:
    """The axis of a Fourier transform was an attribute until opset 19, and is an input since 20."""
    check(lambda whole, mask, x: torch.fft.fft(x, dim=1).real, opset)


@pytest.mark.parametrize(
    "function",
    [
        lambda whole, mask, x: torch.fft.fft(x, dim=1).abs(),
        lambda whole, mask, x: (torch.fft.fft(x, dim=1) * torch.fft.fft(x, dim=0)).imag,
        lambda whole, mask, x: (torch.fft.fft(x, dim=1) * x).real,
        lambda whole, mask, x: torch.view_as_real(torch.fft.fft(x, dim=1) + whole),
    ],
)
def test_complex_numbers_are_pairs_of_real_ones(function: Callable[..., object]) -> None:
    check(function)


def test_parts_of_a_tensor_are_one_split() -> None:
    check(lambda whole, mask, x: (*torch.stack([x, x * 2], 2).unbind(2), *torch.stack([x] * 5, 1).chunk(2, 1)))
    program = check(lambda whole, mask, x: torch.stack([x, x + 1, x + 2], 2).split([1, 2], 2))
    operators = [node.op_type for node in translate(program, 23).graph]
    assert operators.count("Split") == 1
    assert not {"SplitToSequence", "SequenceAt"} & set(operators)


def test_what_changes_nothing_is_not_written() -> None:
    """No slice of all, no sum with 0, no product with 1, no cast to the same dtype; their like that do change stay."""
    idle = check(lambda whole, mask, x: (x[:, :].to(torch.float32) * 1.0 + 0).reshape(x.shape).expand(x.shape) / 1)
    assert [node.op_type for node in translate(idle, 23).graph] == ["Identity"]
    busy = check(lambda whole, mask, x: (x[:, 1:], x[:, ::2], whole + 0.0, x.flip(1), x.to(torch.int32)))
    assert "Identity" not in [node.op_type for node in translate(busy, 23).graph]


def test_an_operator_that_nobody_can_translate_is_named_with_its_place() -> None:
    @torch.library.custom_op("bitlower_test::untranslated", mutates_args=())
    def untranslated(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    untranslated.register_fake(torch.empty_like)
    program = load(Computed(lambda whole, mask, x: untranslated(x)), example_inputs=inputs())
    place = r"bitlower_test\.untranslated.*test_onnx_translate\.py:\d+.*no translation"
    with pytest.raises(BitlowerError, match=place):
        lower(program, opset=23, form="qdq")


def test_torchs_table_is_the_same_without_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are made for what is called; torch's own exporter makes them all, as before."""
    whole = _registration.ONNXRegistry.from_torchlib(23)
    before = _registration.OnnxDecompMeta, _registration.onnxscript_apis
    made: list[object] = []
    plain = _registration._schemas.op_signature_from_function
    monkeypatch.setattr(
        _registration._schemas,
        "op_signature_from_function",
        lambda *args, **options: made.append(args) or plain(*args, **options),
    )
    torchlib._registry.cache_clear()
    short = torchlib._registry(23)
    assert not made
    assert entries(short) == entries(whole)
    assert (_registration.OnnxDecompMeta, _registration.onnxscript_apis) == before


def entries(registry: _registration.ONNXRegistry) -> dict[object, list[tuple[object, bool]]]:
    return {
        target: [(entry.onnx_function, entry.is_complex) for entry in found]
        for target, found in registry.functions.items()
    }
