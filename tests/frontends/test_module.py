"""Modules that are not Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import BitlowerError
from bitlower.ir.verifier import verify


class Pair(nn.Module):
    """Two inputs, outputs by name, a buffer, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = self.drop(torch.relu(layer(x + self.shift)))
        return {"values": x, "pooled": (x * mask[..., None]).sum(1)}


def example(rows: int = 2, length: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, length, 6), "mask": torch.ones(rows, length)}


def test_it_computes_what_the_module_does_at_any_shape() -> None:
    model = Pair().eval()
    program = load(model, example_inputs=example())
    verify(program)
    for shape in ((2, 3), (1, 7), (5, 1), (4, 4)):
        batch = example(*shape)
        with torch.no_grad():
            expected, found = model(**batch), program(**batch)
        assert list(found) == ["values", "pooled"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_names_types_and_source() -> None:
    program = load(Pair(), example_inputs=example())
    assert [str(spec) for spec in program.inputs] == [
        "x: float32[batch, sequence, 6]",
        "mask: float32[batch, sequence]",
    ]
    assert [str(s) for s in program.outputs] == ["values: float32[batch, sequence, 6]", "pooled: float32[batch, 6]"]
    assert program.source == "Pair"
    assert program.config == {}


def test_the_module_and_the_inputs_are_left_as_they_are() -> None:
    model = Pair().train()
    model.drop.eval()
    inputs = example()
    before = {name: value.clone() for name, value in inputs.items()}
    load(model, example_inputs=inputs)
    assert model.training
    assert model.layers[0].training
    assert not model.drop.training
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda self, x: self.inner(x), ["output"]),
        (lambda self, x: (self.inner(x), x + 1), ["output_0", "output_1"]),
        (lambda self, x: {"a": x * 2, "b": self.inner(x)}, ["a", "b"]),
    ],
)
def test_outputs_get_names(forward, names: list[str]) -> None:
    kind = type("Model", (nn.Module,), {"forward": forward})
    model = kind()
    model.inner = nn.Linear(4, 4)
    program = load(model, example_inputs={"x": torch.randn(3, 4)})
    assert [spec.name for spec in program.outputs] == names


def test_inputs_that_are_not_contiguous() -> None:
    turned = torch.randn(4, 3).T
    program = load(nn.Linear(4, 2), example_inputs={"input": turned})
    assert program(input=turned)["output"].shape == (3, 2)


def test_an_input_that_is_no_tensor_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="the example input 'x' is a list; give tensors"):
        load(nn.Linear(4, 2), example_inputs={"x": [1.0]})


def test_an_input_that_forward_does_not_know_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="Linear cannot be traced"):
        load(nn.Linear(4, 2), example_inputs={"unknown": torch.randn(3, 4)})


class Branches(nn.Module):
    """Looks at values to decide what to compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line to name
            return x * 2
        return x


def test_what_cannot_be_traced_names_its_own_line() -> None:
    with pytest.raises(BitlowerError, match=r"Branches cannot be traced at test_module\.py:\d+: .*") as error:
        load(Branches(), example_inputs={"x": torch.randn(3, 4)})
    assert "if x.sum() > 0:" in str(error.value)
    assert "\n" not in str(error.value)


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("only squares")


def test_an_error_of_the_model_itself_is_reported_with_its_line() -> None:
    with pytest.raises(BitlowerError, match=r"Raises cannot be traced at test_module\.py:\d+: raise .*: only squares$"):
        load(Raises(), example_inputs={"x": torch.randn(3, 4)})


class Writes(nn.Module):
    """Changes values in place, through views, and ignores what the calls return."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        before = y.clone()
        y[:, 0] = 3.0
        y.add_(1)
        total = torch.zeros_like(y)
        total.add_(self.relu(before))
        return total * y


def test_writes_in_place_become_values() -> None:
    model = Writes().eval()
    program = load(model, example_inputs={"x": torch.randn(3, 4)})
    verify(program)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert not any(target._schema.is_mutable for target in calls if hasattr(target, "_schema"))
    assert any(n.meta.get("path") == "inner" for n in program.graph.nodes)
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(program(x=x)["output"], model(x))
        assert torch.equal(program.clone()(x=x)["output"], model(x))
