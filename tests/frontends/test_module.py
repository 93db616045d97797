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


class Same(nn.Module):
    """Gives its input, a parameter, a buffer, one value twice, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.inner(x)
        parts = (y, [x.mT])
        return {
            "x": x,
            "y": y,
            "again": y,
            "weight": self.inner.weight,
            "shift": self.shift,
            "none": None,
            "parts": parts,
        }


def test_outputs_may_be_inputs_parameters_or_the_same_value_twice() -> None:
    model = Same().eval()
    program = load(model, example_inputs={"x": torch.randn(3, 4)})
    verify(program)
    names = ["x", "y", "again", "weight", "shift", "parts_0", "parts_1_0"]
    assert [spec.name for spec in program.outputs] == names
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected, found = model(x), program(x=x)
    assert all(torch.equal(found[name], expected[name]) for name in names[:5])
    assert torch.equal(found["parts_1_0"], x.mT)


class Count(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x * 2, 3


def test_an_output_that_is_no_tensor_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="the output 'output_1' is no tensor; return tensors alone"):
        load(Count(), example_inputs={"x": torch.randn(3, 4)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_cast_with_a_note(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(dtype).eval()
    x = torch.randn(3, 4, dtype=dtype)
    program = load(model, example_inputs={"input": x})
    name = str(dtype).removeprefix("torch.")
    assert program.notes == (f"Sequential has tensors of other floats (2 in {name}): cast to float32",)
    assert [str(spec) for spec in program.inputs] == ["input: float32[batch, 4]"]
    assert model[0].weight.dtype == dtype
    wide = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(program(input=x)["output"], wide(x.float()))


class Widths(nn.Module):
    """Parameters of two widths and buffers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4).half()
        self.register_buffer("scale", torch.rand(4, dtype=torch.float16))
        self.register_buffer("steps", torch.tensor([1, -2, 3, 4], dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second((x * self.scale).to(self.second.weight.dtype)).to(x.dtype)
        return self.first(x) * self.steps + y


def test_a_module_of_several_widths_is_computed_in_one() -> None:
    model = Widths().eval()
    program = load(model, example_inputs={"x": torch.randn(3, 4)})
    assert program.notes == ("Widths has tensors of other floats (3 in float16): cast to float32",)
    assert {str(t.dtype) for _, t in program.tensors()} == {"torch.float32", "torch.int8"}
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(program(x=x)["output"], model(x), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["a-b", "0", "len", "output", "x"])
def test_parts_may_be_called_anything_that_a_graph_can_name(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    program = load(model, example_inputs={"input": torch.randn(3, 4)})
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(program(input=x)["output"], model(x))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "class", "a b"])
def test_names_that_a_graph_cannot_hold_are_errors(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    with pytest.raises(BitlowerError, match=f"Sequential has a part called '{name}', .*; call it otherwise"):
        load(model, example_inputs={"input": torch.randn(3, 4)})


def test_a_trace_that_fails_prints_nothing(capfd) -> None:
    with pytest.raises(BitlowerError, match="depends on the values of its inputs, which a trace cannot follow; choose"):
        load(Branches(), example_inputs={"x": torch.randn(3, 4)})
    assert capfd.readouterr() == ("", "")
