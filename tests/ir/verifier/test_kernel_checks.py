"""The verifier on fused programs: a whole one passes, and each planted fault is found and named."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from bitlower.ir import (
    CheckError,
    Granularity,
    Grid,
    Level,
    Program,
    Quantizer,
    QuantSpec,
    TensorType,
    ValueSpec,
    get_tensor,
    kernels,
    ops,
    set_tensor,
)
from bitlower.ir.verifier import verify
from bitlower.ir.verifier.kernels import _check_options

STATIC = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
TOKEN = QuantSpec(Grid(8), Granularity.per_token())
WEIGHT = QuantSpec(Grid(4), Granularity.per_channel(0))
X, Y = TensorType(torch.float32, ("batch", 4)), TensorType(torch.float32, ("batch", 6))
WHERE = {"path": "encoder.dense", "source": "model.py:7: self.dense(x)"}


class Fused:
    """``norm → codes → linear (+ residual) → codes per token → pointwise``, built by hand."""

    def __init__(self) -> None:
        self.module, self.graph = fx.GraphModule(nn.Module(), fx.Graph()), fx.Graph()
        torch.manual_seed(0)
        x = self.graph.placeholder("x")
        x.meta["type"] = X
        act, inner = self.scales("act", torch.tensor(0.02), 100.0), self.scales("inner", torch.tensor(0.5), 3.0)
        self.norm = self.kernel(
            "norm", kernels.fused_norm, (x, self.stored("gain", torch.ones(4)), None),
            {"norm": "layer", "eps": 1e-5, **named("out", act), "out_grid": "u8 asymmetric", "outputs": "value codes"},
            {"out": Quantizer("linear-input", STATIC, "x")},
        )  # fmt: skip
        value, codes = self.take(self.norm)
        weight = self.stored("dense.weight_codes", torch.randint(-8, 8, (6, 4), dtype=torch.int8))
        self.linear = self.kernel(
            "linear", kernels.fused_linear, (codes, weight, *self.scales("weight", torch.rand(6, 1) + 0.1, 0.0)),
            {**named("x", act), **named("rounded", inner), "rounded_grid": "u8 asymmetric", "outputs": "value"},
            {
                "x": Quantizer("linear-input", STATIC, "x"),
                "weight": Quantizer("linear-weight", WEIGHT, "dense.weight"),
                "rounded": Quantizer("linear-output", STATIC, "linear"),
            },
        )  # fmt: skip
        [y] = self.take(self.linear)
        self.token = self.kernel(
            "token", kernels.fused_pointwise, (y,),
            {"activation": "relu", "out_grid": "s8", "outputs": "codes scale zero_point"},
            {"out": Quantizer("activation", TOKEN, "linear")},
        )  # fmt: skip
        codes, *pair = self.take(self.token)
        self.last = self.kernel(
            "last", kernels.fused_pointwise, (codes,), {**named("x", pair), "activation": "gelu", "outputs": "value"},
            {"x": Quantizer("activation", TOKEN, "linear")},
        )  # fmt: skip
        [out] = self.take(self.last)
        self.graph.output((out, value))

    def stored(self, target: str, tensor: torch.Tensor) -> fx.Node:
        set_tensor(self.module, target, tensor)
        node = self.graph.get_attr(target)
        node.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))
        return node

    def scales(self, name: str, scale: torch.Tensor, zero: float) -> tuple[fx.Node, fx.Node]:
        zero_point = torch.full_like(scale, zero)
        return self.stored(f"quantizers.{name}.scale", scale), self.stored(f"quantizers.{name}.zero_point", zero_point)

    def kernel(self, name, target, args, kwargs, quantizers) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = dict(WHERE) | {"quantizers": quantizers}
        return node

    def take(self, kernel: fx.Node) -> list[fx.Node]:
        found = []
        for index, output in enumerate(kernels.outputs(kernel)):
            node = self.graph.call_function(operator.getitem, (kernel, index))
            node.meta = dict(WHERE) | {"type": output.type}
            found.append(node)
        return found

    def program(self, level: Level = Level.FUSED) -> Program:
        module = fx.GraphModule(self.module, self.graph)
        outputs = (ValueSpec("y", Y), ValueSpec("norm", X))
        return Program({"model": module}, level, "custom", (ValueSpec("x", X),), outputs)


def named(name: str, pair) -> dict[str, fx.Node]:
    return {f"{name}_scale": pair[0], f"{name}_zero_point": pair[1]}


def test_a_sound_program_passes_and_runs() -> None:
    program = Fused().program()
    verify(program)
    assert program(x=torch.randn(3, 4))["y"].shape == (3, 6)


@pytest.mark.parametrize("grid", ["scores_grid", "probs_grid"])
def test_attention_rounds_inside_only_step_by_step(grid: str) -> None:
    node = fx.Graph().call_function(kernels.fused_attention, ())
    _check_options(node, {"explicit": True, grid: "u8"})
    _check_options(node, {"explicit": False, grid: ""})
    with pytest.raises(CheckError, match="rounds inside an attention that is not explicit"):
        _check_options(node, {"explicit": False, grid: "u8"})


@pytest.mark.parametrize("level", [Level.FLOAT, Level.SIMULATED, Level.INTEGER])
def test_kernels_belong_to_one_level(level: Level) -> None:
    with pytest.raises(CheckError, match="does not belong into a program at level"):
        verify(Fused().program(level))


def scale(target: str, value: object) -> Callable[[Fused], None]:
    def plant(fused: Fused) -> None:
        tensor = torch.as_tensor(value)
        set_tensor(fused.module, f"quantizers.{target}", tensor)
        for node in fused.graph.find_nodes(op="get_attr"):
            if node.target == f"quantizers.{target}":
                node.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))

    return plant


def argument(kernel: str, **values: object) -> Callable[[Fused], None]:
    def plant(fused: Fused) -> None:
        node = getattr(fused, kernel)
        for name, value in values.items():
            node.kwargs = {**node.kwargs, name: value}

    return plant


def quantizer(kernel: str, name: str, **changes: object) -> Callable[[Fused], None]:
    def plant(fused: Fused) -> None:
        held = getattr(fused, kernel).meta["quantizers"]
        held[name] = replace(held[name], **changes)

    return plant


def other_scale(fused: Fused) -> None:
    pair = fused.scales("other", torch.tensor(0.5), 0.0)
    for node in pair:
        fused.norm.prepend(node)
    fused.linear.kwargs = {**fused.linear.kwargs, **named("x", pair)}


def float_for_codes(fused: Fused) -> None:
    fused.linear.args = (next(iter(fused.norm.users)), *fused.linear.args[1:])


def codes_of_nothing(fused: Fused) -> None:
    with fused.graph.inserting_before(fused.linear):
        made = fused.graph.call_function(torch.ops.aten.to.dtype, (fused.linear.args[0], torch.uint8))
    made.meta = dict(WHERE) | {"type": X.with_dtype(torch.uint8)}
    fused.linear.args = (made, *fused.linear.args[1:])


def wrong_type(fused: Fused) -> None:
    next(iter(fused.token.users)).meta["type"] = Y


def beyond(fused: Fused) -> None:
    next(iter(fused.last.users)).args = (fused.last, 1)


def swapped(fused: Fused) -> None:
    first, second = fused.last.kwargs["x_scale"], fused.last.kwargs["x_zero_point"]
    fused.last.kwargs = {**fused.last.kwargs, "x_scale": second, "x_zero_point": first}


def short_bias(fused: Fused) -> None:
    bias = fused.stored("bias", torch.zeros(5))
    fused.linear.prepend(bias)
    fused.linear.args = (*fused.linear.args, bias)


def no_quantizers(fused: Fused) -> None:
    del fused.last.meta["quantizers"]


def stray_quantizers(fused: Fused) -> None:
    next(iter(fused.last.users)).meta["quantizers"] = {}


def large_codes(fused: Fused) -> None:
    get_tensor(fused.module, "dense.weight_codes")[0, 0] = 9


def out_of_place(fused: Fused) -> None:
    """A lone ``quantize`` whose codes a kernel reads with another scale."""
    pair, other = fused.scales("lone", torch.tensor(0.5), 0.0), fused.scales("another", torch.tensor(0.25), 0.0)
    spec = Quantizer("activation", STATIC, "x")
    value = next(iter(fused.norm.users))
    for node in (*pair, *other):
        fused.norm.prepend(node)
    with fused.graph.inserting_before(fused.linear):
        codes = fused.graph.call_function(ops.quantize, (value, *pair, 0, 255, "uint8"))
    codes.meta = dict(WHERE) | {"type": X.with_dtype(torch.uint8), "quantizer": spec}
    fused.linear.args = (codes, *fused.linear.args[1:])
    fused.linear.kwargs = {**fused.linear.kwargs, **named("x", other)}


def superfluous(fused: Fused) -> None:
    fused.last.meta["quantizers"]["factor"] = Quantizer("activation", STATIC, "x")


def through_a_view(fused: Fused) -> None:
    """Scales for each token do not move with the codes."""
    with fused.graph.inserting_before(fused.last):
        turned = fused.graph.call_function(torch.ops.aten.clone.default, (fused.last.args[0],))
    turned.meta = dict(WHERE) | {"type": Y.with_dtype(torch.int8)}
    fused.last.args = (turned,)


FAULTS = {
    "an output that no kernel has": (argument("last", outputs="values"), "gives 'values'; did you mean 'value'"),
    "outputs out of order": (argument("norm", outputs="codes value"), r"the order is \['sum'"),
    "no outputs": (argument("last", outputs=""), "the order is"),
    "codes without a grid": (argument("last", outputs="codes"), "gives codes and has no grid"),
    "a scale that is stored": (argument("norm", outputs="codes scale"), "gives a scale that it does not choose"),
    "a sum of one": (argument("norm", outputs="sum codes"), "gives a sum and has no residual"),
    "a linear that chooses scales": (argument("linear", out_grid="s8"), "this kernel chooses none"),
    "an unknown activation": (argument("last", activation="gelo"), "unknown activation 'gelo'; did you mean 'gelu'"),
    "an unknown norm": (argument("norm", norm="batch"), "unknown norm 'batch'"),
    "half a rounding": (argument("linear", rounded_zero_point=None), "'rounded' is not whole"),
    "a rounding without a grid": (argument("linear", rounded_grid=""), "'rounded' is not whole"),
    "another grid": (argument("linear", rounded_grid="s8"), "rounds 'rounded' to s8, the quantizer is u8"),
    "another quantizer": (quantizer("norm", "out", spec=TOKEN), "rounds 'out' to u8 asymmetric, the quantizer is s8"),
    "a static rounding without a scale": (
        quantizer("token", "out", spec=replace(TOKEN, granularity=Granularity.per_tensor())),
        "per-tensor scales are stored tensors",
    ),
    "a scale of another shape": (scale("act.scale", [0.1, 0.2]), "its scale is"),
    "a negative scale": (scale("inner.scale", -1.0), "negative or not finite"),
    "a scale of zero": (scale("inner.scale", 0.0), "has a scale of zero"),
    "half a zero point": (scale("inner.zero_point", 0.5), "no whole number"),
    "a zero point outside": (scale("act.zero_point", 300.0), r"outside \[0, 255\]"),
    "weight scales of another shape": (scale("weight.scale", [[0.1]] * 5), "per-channel"),
    "a symmetric weight with a zero point": (scale("weight.zero_point", [[1.0]] * 6), r"outside \[0, 0\]"),
    "codes outside of the grid": (large_codes, "outside the grid s4"),
    "weight codes of another grid": (
        quantizer("linear", "weight", spec=replace(WEIGHT, grid=Grid(4, signed=False, symmetric=False))),
        "is held in torch.uint8",
    ),
    "a float where codes are said": (float_for_codes, "codes take a quantizer, a scale and a zero point"),
    "codes from nowhere": (codes_of_nothing, "which holds no codes"),
    "a scale that they were not made with": (other_scale, "another scale or zero point than"),
    "scale and zero point swapped": (swapped, "another scale or zero point than"),
    "a lone quantize with another scale": (out_of_place, "another scale or zero point than"),
    "a wrong type of a result": (wrong_type, "is of type"),
    "a result beyond the last": (beyond, "only its 1 results"),
    "a bias of another length": (short_bias, "its bias do not fit"),
    "sizes that do not add up": (argument("linear", merged_n=[2, 3]), "its merged_n do not fit"),
    "columns that do not add up": (argument("linear", columns=[2, 1]), "its slices do not fit"),
    "a quantizer of nothing": (superfluous, "for 'factor', which it neither reads nor rounds"),
    "token scales and a view": (through_a_view, "through %clone_default, and its scales do not follow"),
    "no quantizers": (no_quantizers, "does not say what its codes and roundings are"),
    "quantizers elsewhere": (stray_quantizers, "carries quantizers but is no kernel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    plant, message = FAULTS[name]
    fused = Fused()
    plant(fused)
    with pytest.raises(CheckError, match=message) as error:
        verify(fused.program())
    assert "encoder.dense" in str(error.value) or "get_attr" in str(error.value)


def embedding() -> Fused:
    """A sum of three tables with a rounding inside, in the place of everything else."""
    fused = Fused()
    values = fused.graph.output_node().args[0]
    fused.graph.erase_node(fused.graph.output_node())
    ids = fused.stored("ids", torch.tensor([[0, 1, 2, 3]]))
    tables = [fused.stored(f"table_{i}_codes", torch.randint(-8, 8, (5, 6), dtype=torch.int8)) for i in range(3)]
    pairs = [fused.scales(f"table_{i}", torch.rand(5, 1) + 0.1, 0.0) for i in range(3)]
    inner = fused.scales("sum", torch.tensor(0.1), 100.0)
    weight = {f"table_{i}": Quantizer("embedding-table", WEIGHT, f"table_{i}") for i in range(3)}
    fused.last = fused.kernel(
        "last", kernels.fused_embedding, ([ids] * 3, tables),
        {
            "table_scales": [pair[0] for pair in pairs], "table_zero_points": [pair[1] for pair in pairs],
            "rounded_scales": [inner[0]], "rounded_zero_points": [inner[1]], "rounded_grid": "u8 asymmetric",
        },
        weight | {"rounded_0": Quantizer("embedding-sum", STATIC, "sum")},
    )  # fmt: skip
    [out] = fused.take(fused.last)
    fused.graph.output((out, values[1]))
    return fused


def shorter(name: str) -> Callable[[Fused], None]:
    def plant(fused: Fused) -> None:
        fused.last.kwargs = {**fused.last.kwargs, name: fused.last.kwargs[name][:-1]}

    return plant


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda fused: None, ""),
        (shorter("table_scales"), "has 3 tables, 2 table_scales, 3 table_zero_points, 3 ids"),
        (shorter("rounded_scales"), "has 0 rounded_scales, 1 rounded_zero_points"),
        (argument("last", rounded_grid="s8"), "rounds 'rounded_0' to s8"),
        (scale("sum.scale", [[0.1]]), "per-tensor of"),
        (scale("table_1.scale", [[0.1]] * 4), "per-channel"),
        (scale("table_2.zero_point", [[1.0]] * 5), "outside"),
    ],
)
def test_lists_of_tables(plant: Callable[[Fused], None], message: str) -> None:
    fused = embedding()
    plant(fused)
    program = fused.program()
    program.outputs = (ValueSpec("y", TensorType(torch.float32, (1, 4, 6))), program.outputs[1])
    if not message:
        verify(program)
        return
    with pytest.raises(CheckError, match=message):
        verify(program)
