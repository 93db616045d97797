"""Arguments by name and typed views of nodes, against torch's own dispatcher."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional

from bitlower.ir import dataflow
from bitlower.ir.operators import (
    OPERATORS,
    AttentionNode,
    BinaryNode,
    ConvNode,
    EmbeddingNode,
    LinearNode,
    NodeView,
    NormNode,
    Operator,
    argument,
    graph_results,
    operand,
    parameters,
    set_argument,
    set_graph_results,
    swapped_axes,
    value_operands,
)
from bitlower.ir.quantization.scheme import WEIGHT_ROLES
from bitlower.ir.types import TensorType

aten = torch.ops.aten
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
W = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
B = torch.randn(8, generator=torch.Generator().manual_seed(3))
Q = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(4))
K = torch.randn(8, 2, 2, 3, generator=torch.Generator().manual_seed(5))
CALLS: dict[Any, dict[str, Any]] = {
    aten.linear.default: {"input": X, "weight": W, "bias": B},
    aten.addmm.default: {"self": B, "mat1": X[0], "mat2": W},
    aten.conv1d.default: {"input": X, "weight": W[:6, :3].unflatten(1, (3, 1)), "stride": [2]},
    aten.conv1d.padding: {"input": X, "weight": K[:6, :1, 0], "padding": "same", "dilation": [2], "groups": 3},
    aten.conv2d.default: {"input": Q, "weight": K, "bias": B, "stride": [1, 2], "padding": [2, 1], "dilation": [1, 3]},
    aten.conv2d.padding: {"input": Q, "weight": K, "padding": "valid"},
    aten.embedding.default: {"weight": W, "indices": torch.tensor([3, 1])},
    aten.layer_norm.default: {"input": X, "normalized_shape": [8], "weight": B, "bias": B + 1, "eps": 1e-3},
    aten.native_layer_norm.default: {"input": X, "normalized_shape": [8], "weight": B, "bias": B + 1, "eps": 1e-3},
    aten.rms_norm.default: {"input": X, "normalized_shape": [8], "weight": B, "eps": 1e-3},
    aten.matmul.default: {"self": X, "other": W},
    aten.bmm.default: {"self": X, "mat2": X.transpose(1, 2)},
    aten.mm.default: {"self": X[0], "mat2": W},
    aten.scaled_dot_product_attention.default: {"query": Q, "key": Q + 1, "value": Q + 2, "scale": 0.3},
    aten.softmax.int: {"self": X, "dim": -1},
    aten._softmax.default: {"self": X, "dim": -1, "half_to_float": False},
    aten._safe_softmax.default: {"self": X, "dim": -1},
    aten.add.Tensor: {"self": X, "other": B},
    aten.add_.Tensor: {"self": X.clone(), "other": B},
}
"""A call of every operator of the table, by the names of its schema."""


def node_of(target: Any, named: dict[str, Any], positional: int) -> tuple[fx.Node, dict[fx.Node, Any]]:
    """A call with its first ``positional`` arguments by place and the others by name; and what its nodes stand for."""
    graph, values = fx.Graph(), dict[fx.Node, Any]()

    def held(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(name)
        values[node] = value
        return node

    by_name = {name: held(name, value) for name, value in named.items()}
    allowed = [a.name for a in target._schema.arguments if not a.kwarg_only and a.name in by_name]
    first = list(itertools.takewhile(lambda name: name in allowed, parameters(target)))[:positional]
    args = tuple(by_name.pop(name) for name in first)
    return graph.call_function(target, args, by_name), values


@given(row=st.sampled_from(OPERATORS), positional=st.integers(0, 6))
def test_arguments_are_found_wherever_they_stand(row: Operator, positional: int) -> None:
    node, values = node_of(row.target, CALLS[row.target], positional)
    expected = row.target(**CALLS[row.target])
    found = {name: argument(node, name) for name in parameters(row.target)}
    given_ = {name: values.get(value, value) if isinstance(value, fx.Node) else value for name, value in found.items()}
    actual = row.target(**given_)
    if row.target is aten.add_.Tensor:  # it has written to its operand
        expected = CALLS[row.target]["self"]
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    assert all(torch.equal(*pair) for pair in pairs)


@given(row=st.sampled_from(OPERATORS), positional=st.integers(0, 6), data=st.data())
def test_another_argument_changes_nothing_else(row: Operator, positional: int, data: st.DataObject) -> None:
    node, _ = node_of(row.target, CALLS[row.target], positional)
    before = {name: argument(node, name) for name in parameters(row.target)}
    name = data.draw(st.sampled_from([a.name for a in row.target._schema.arguments if not a.kwarg_only]))
    set_argument(node, name, "new")
    assert {other: argument(node, other) for other in before} == before | {name: "new"}


def test_an_argument_that_only_has_a_name_is_set_by_it() -> None:
    node, _ = node_of(aten.scaled_dot_product_attention.default, CALLS[aten.scaled_dot_product_attention.default], 3)
    set_argument(node, "scale", 0.5)
    assert node.kwargs["scale"] == 0.5
    assert argument(node, "enable_gqa") is False


def test_an_operator_without_such_an_argument_is_an_error() -> None:
    node, _ = node_of(aten.mm.default, CALLS[aten.mm.default], 2)
    with pytest.raises(KeyError):
        argument(node, "bias")


def test_an_operand_that_is_no_node_is_named() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), 2.0))
    assert value_operands(node) == [operand(node, "self")]
    with pytest.raises(AssertionError, match="the argument other of %add_tensor is no node"):
        operand(node, "other")


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: str(row.target))
def test_rows_name_arguments_that_the_schema_has(row: Operator) -> None:
    assert set(row.operands.values()) <= set(parameters(row.target))
    assert row.target in CALLS
    assert bool(row.parameter) == bool(row.role)
    if row.role:
        assert row.role in WEIGHT_ROLES
        assert row.parameter in row.operands


def test_the_sets_of_dataflow_are_the_kinds_of_the_table() -> None:
    kinds = {
        "linear": dataflow.LINEAR, "product": dataflow.MATMUL, "attention": dataflow.ATTENTION, "sum": dataflow.ADD,
        "softmax": dataflow.SOFTMAX, "norm": dataflow.NORM, "embedding": dataflow.EMBEDDING,
        "convolution": dataflow.CONVOLUTION,
    }  # fmt: skip
    assert {row.kind for row in OPERATORS} == set(kinds)
    for kind, targets in kinds.items():
        assert targets == {row.target for row in OPERATORS if row.kind == kind}
    assert len({row.target for row in OPERATORS}) == len(OPERATORS)


def view(kind: type[NodeView], target: Any, **named: Any) -> tuple[Any, dict[Any, Any]]:
    node, values = node_of(target, named or CALLS[target], 9)
    return kind(node), values


@pytest.mark.parametrize("target", [aten.linear.default, aten.addmm.default])
def test_a_linear_layer_by_its_operands(target: Any) -> None:
    linear, values = view(LinearNode, target)
    x, weight, bias = (values[node] for node in (linear.x, linear.weight, linear.bias))
    weight = weight.T if target is aten.linear.default else weight
    torch.testing.assert_close(target(**CALLS[target]), x @ weight + bias)
    assert linear.stored_bias is None  # an input of the graph


def test_a_linear_layer_without_a_bias_gets_one() -> None:
    linear, _ = view(LinearNode, aten.linear.default, input=X, weight=W)
    assert linear.bias is None
    stored = linear.node.graph.get_attr("b")
    linear.set("bias", stored)
    assert linear.bias is stored
    assert linear.stored_bias == "b"


@pytest.mark.parametrize("target", sorted(dataflow.CONVOLUTION, key=str))
def test_a_convolution_by_its_operands(target: Any) -> None:
    conv, values = view(ConvNode, target)
    for node, value in values.items():
        node.meta["type"] = TensorType(value.dtype, tuple(value.shape))
    x, weight = values[conv.x].double(), values[conv.weight].double()
    assert (conv.kernel, conv.has_batch) == (tuple(weight.shape[2:]), True)
    around = [count for pair in reversed(conv.padding) for count in pair]
    padded = functional.pad(x, around)
    assert conv.is_padded == (padded.shape != x.shape)
    convolve = functional.conv1d if weight.dim() == 3 else functional.conv2d
    bias = values[conv.bias].double() if conv.bias is not None else None
    options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    expected = convolve(padded, weight, bias, **options)
    torch.testing.assert_close(target(**CALLS[target]).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", sorted(dataflow.NORM, key=str))
def test_a_norm_by_its_operands(target: Any) -> None:
    norm, values = view(NormNode, target)
    x, weight = values[norm.x].double(), values[norm.weight].double()
    mean = 0.0 if norm.is_rms else x.mean(-1, keepdim=True)
    power = (x - mean).square().mean(-1, keepdim=True)
    expected = (x - mean) / (power + norm.epsilon).sqrt() * weight
    expected = expected + values[norm.bias].double() if norm.bias is not None else expected
    result = target(**CALLS[target])
    result = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert (norm.bias is None) == norm.is_rms


def test_a_norm_without_parameters_has_the_schema_s_epsilon() -> None:
    norm, _ = view(NormNode, aten.layer_norm.default, input=X, normalized_shape=[8])
    assert (norm.weight, norm.bias, norm.epsilon) == (None, None, 1e-5)
    norm.set("bias", norm.x)
    assert (norm.weight, norm.bias) == (None, norm.x)


def test_an_embedding_by_its_operands() -> None:
    lookup, values = view(EmbeddingNode, aten.embedding.default)
    expected = aten.embedding.default(**CALLS[aten.embedding.default])
    assert torch.equal(values[lookup.table][values[lookup.ids]], expected)


@pytest.mark.parametrize("target", sorted(dataflow.MATMUL, key=str))
def test_a_product_by_its_operands(target: Any) -> None:
    product, values = view(BinaryNode, target)
    torch.testing.assert_close(target(**CALLS[target]), values[product.left] @ values[product.right])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_by_its_operands(scale: float | None, masked: bool) -> None:
    mask = {"attn_mask": torch.randn(2, 1, 3, 3)} if masked else {}
    named = {"query": Q, "key": Q + 1, "value": Q + 2, "is_causal": not masked, "scale": scale} | mask
    call, values = view(AttentionNode, aten.scaled_dot_product_attention.default, **named)
    call.query.meta["type"] = TensorType(torch.float32, tuple(Q.shape))
    scores = values[call.query] @ values[call.key].transpose(-2, -1) * call.scale
    if call.is_causal:
        scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf)
    if call.mask is not None:
        scores = scores + values[call.mask]
    expected = scores.softmax(-1) @ values[call.value]
    torch.testing.assert_close(functional.scaled_dot_product_attention(**named), expected)
    assert call.has_dropout is False


def test_heads_of_a_symbolic_width_have_no_scale() -> None:
    call, _ = view(AttentionNode, aten.scaled_dot_product_attention.default, query=Q, key=Q, value=Q)
    call.query.meta["type"] = TensorType(torch.float32, (2, 2, 3, "width"))
    assert call.scale is None


@given(rank=st.integers(2, 5), data=st.data())
def test_swapped_axes_are_those_whose_sizes_change_places(rank: int, data: st.DataObject) -> None:
    first, second = data.draw(st.lists(st.integers(-rank, rank - 1), min_size=2, max_size=2))
    graph = fx.Graph()
    node = graph.call_function(aten.transpose.int, (graph.placeholder("x"), first, second))
    x = torch.empty(*range(2, 2 + rank))
    node.meta["type"] = TensorType(torch.float32, tuple(x.shape))
    turned = x.transpose(first, second).shape
    moved = {axis for axis, (before, after) in enumerate(zip(x.shape, turned, strict=True)) if before != after}
    axes = swapped_axes(node)
    assert axes == moved if moved else len(axes) == 1
    assert swapped_axes(operand(node, "self")) == frozenset()


def test_results_of_a_graph_are_read_and_set() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((x,))
    assert graph_results(graph) == (x,)
    set_graph_results(graph, [x, y])
    assert graph_results(graph) == (x, y)
    assert list(y.users) == [graph.output_node()]


def test_a_part_is_found_by_its_index() -> None:
    graph = fx.Graph()
    split = graph.call_function(aten.chunk.default, (graph.placeholder("x"), 2))
    part = graph.call_function(operator.getitem, (split, 1))
    assert operand(part, "source") is split
    assert argument(part, "index") == 1
