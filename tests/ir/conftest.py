"""Small programs that need no model: one traced by torch.export, one with every kind of quantizer node."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import fx, nn

from bitlower.frontends.module import trace_module
from bitlower.ir import (
    Granularity,
    Grid,
    Level,
    Program,
    Quantizer,
    QuantSpec,
    TensorType,
    ValueSpec,
    get_tensor,
    ops,
    set_tensor,
)

FLOAT = torch.float32


class Tied(nn.Module):
    """An embedding whose table is also the output weight, a mask that makes infinities, a reshape by symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.table(ids) + self.offset)
        rows, columns = ids.shape
        split = self.inner(x).view(rows, columns, 2, 4).transpose(1, 2)
        scores = (split @ split.transpose(-1, -2)).masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        x = x + (scores.softmax(-1) @ split).transpose(1, 2).reshape(rows, columns, 8)
        return {"hidden": x, "logits": self.out(x)[:, 1:]}


def _batch(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return {
        "ids": torch.randint(0, 11, (rows, columns), generator=generator),
        "mask": torch.ones(rows, columns, dtype=torch.int64),
    }


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Inputs of ``exported``, of another shape than it was traced on."""
    return _batch(3, 5)


@pytest.fixture
def exported(_traced: Program) -> Program:
    """A program as torch.export gives it, with tied weights, files and a configuration."""
    return copy.deepcopy(_traced)


@pytest.fixture(scope="session")
def _traced() -> Program:
    torch.manual_seed(0)
    program = trace_module(Tied(), _batch(2, 4), task="custom")
    _name_twice(program)
    program.config = {"architectures": ["Tied"], "id2label": {str(i): f"label-{i}" for i in range(11)}}
    program.assets = {"tokenizer.json": b"\x00\xff{}", "vocab.txt": b"a\nb\n"}
    program.source, program.passes = "tests", ["clean", "quantize{scheme=W8A8}"]
    return program


def _name_twice(program: Program) -> None:
    """Give the tied weight its second name back, which torch.export drops."""
    lookup = next(n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default)
    weight = lookup.args[0]
    set_tensor(program.module, "table.weight", get_tensor(program.module, weight.target))
    with program.graph.inserting_before(weight):
        second = program.graph.get_attr("table.weight")
    second.meta = dict(weight.meta)
    lookup.args = (second, *lookup.args[1:])
    program.recompile()


@pytest.fixture
def quantized() -> Program:
    """A linear layer at level ``integer`` with a static, an uncalibrated and a dynamic quantizer, built by hand."""
    root = fx.GraphModule(nn.Module(), fx.Graph())
    set_tensor(root, "dense.weight_codes", torch.tensor([[-127, 3], [64, 127], [1, 0]], dtype=torch.int8))
    set_tensor(root, "dense.bias", nn.Parameter(torch.tensor([0.5, -0.5, 0.0])))
    for name, scale, zero in [
        ("weight", torch.tensor([[0.5], [0.25], [2.0]]), torch.zeros(3, 1)),
        ("act", torch.tensor(0.125), torch.tensor(100.0)),
        ("later", torch.tensor(0.0), torch.tensor(0.0)),
    ]:
        set_tensor(root, f"quantizers.{name}.scale", scale)
        set_tensor(root, f"quantizers.{name}.zero_point", zero)
    graph = fx.Graph()
    root = fx.GraphModule(root, _build(graph))
    value = TensorType(FLOAT, ("batch", 2))
    outputs = (ValueSpec("logits", TensorType(FLOAT, ("batch", 3))), ValueSpec("dynamic", value))
    return Program({"model": root}, Level.INTEGER, "custom", (ValueSpec("x", value),), outputs)


def _build(graph: fx.Graph) -> fx.Graph:
    act = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
    token = QuantSpec(Grid(8), Granularity.per_token())
    value = TensorType(FLOAT, ("batch", 2))

    def parameters(name: str) -> tuple[fx.Node, fx.Node]:
        return graph.get_attr(f"quantizers.{name}.scale"), graph.get_attr(f"quantizers.{name}.zero_point")

    def call(name: str, target: object, *args: object, quantizer: Quantizer | None = None) -> fx.Node:
        node = graph.create_node("call_function", target, args, name=name)
        node.meta = {"type": value, "path": "dense"} | ({"quantizer": quantizer} if quantizer else {})
        return node

    x = graph.placeholder("x")
    quantizer = Quantizer("linear-input", act, "x")
    codes = call("x_codes", ops.quantize, x, *parameters("act"), 0, 255, "uint8", quantizer=quantizer)
    codes.meta["type"] = value.with_dtype(torch.uint8)
    values = call("x_values", ops.dequantize, codes, *parameters("act"), quantizer=quantizer)
    weight_spec = QuantSpec(Grid(8, restricted=True), Granularity.per_channel(0))
    codes = graph.get_attr("dense.weight_codes")
    quantizer = Quantizer("linear-weight", weight_spec, "dense.weight")
    weight = call("weight", ops.dequantize, codes, *parameters("weight"), quantizer=quantizer)
    weight.meta["type"] = TensorType(FLOAT, (3, 2))
    linear = call("linear", torch.ops.aten.linear.default, values, weight, graph.get_attr("dense.bias"))
    linear.meta = {"path": "dense", "source": "model.py:3: y = dense(x)", "type": TensorType(FLOAT, ("batch", 3))}
    quantizer = Quantizer("linear-output", act, "linear")
    uncalibrated = call("out", ops.fake_quantize, linear, *parameters("later"), 0, 255, quantizer=quantizer)
    uncalibrated.kwargs = {"calibrated": False}
    uncalibrated.meta["type"] = linear.meta["type"]
    pair = call("pair", ops.choose_qparams, x, 8, True, True, False, "qmax")
    del pair.meta["type"]
    scale, zero = call("scale", operator.getitem, pair, 0), call("zero", operator.getitem, pair, 1)
    scale.meta["type"] = zero.meta["type"] = TensorType(FLOAT, ("batch", 1))
    quantizer = Quantizer("residual", token, "x")
    dynamic = call("x_rounded", ops.fake_quantize, x, scale, zero, -128, 127, quantizer=quantizer)
    graph.output((uncalibrated, dynamic))
    return graph
