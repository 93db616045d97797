"""What a kernel in a graph reads and gives: arguments by name, output types, what getitem takes out."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from bitlower.ir import TensorType, kernels

FLOAT, U8 = torch.float32, torch.uint8


def graph_of(target, kinds: dict[str, TensorType], lists=(), **options) -> fx.Node:
    """A kernel node whose operands have these types."""
    graph = fx.Graph()
    operands = {}
    for name, kind in kinds.items():
        operands[name] = graph.placeholder(name)
        operands[name].meta["type"] = kind
    for name in lists:
        operands[name] = [operands.pop(key) for key in list(operands) if key.startswith(name)]
    return graph.call_function(target, (), operands | options)


def test_arguments_have_their_names_however_they_are_given() -> None:
    graph = fx.Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    node = graph.call_function(kernels.fused_norm, (x, weight), {"bias": bias, "norm": "rms", "eps": None})
    assert kernels.arguments(node) == {"x": x, "weight": weight, "bias": bias, "norm": "rms", "eps": None}


def test_every_kernel_is_described() -> None:
    for table in (kernels.OPERANDS, kernels.ROUNDINGS, kernels.OUTPUTS):
        assert set(table) == kernels.KERNELS
    for op in kernels.KERNELS:
        names = {argument.name for argument in op._schema.arguments}
        assert {
            part for name in kernels.OPERANDS[op] for part in (name, f"{name}_scale", f"{name}_zero_point")
        } <= names
        parts = ("scale", "zero_point", "grid")
        assert {f"{name}_{part}" for name in kernels.ROUNDINGS[op] for part in parts} <= names


X = TensorType(U8, ("batch", "sequence", 32))
WEIGHT = TensorType(torch.int8, (96, 32))
QUERY = TensorType(FLOAT, ("batch", 4, "sequence", 8))
KEY = TensorType(FLOAT, ("batch", 2, "past + sequence", 8))


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (graph_of(kernels.fused_linear, {"x": X, "weight": WEIGHT}), ["float32[batch, sequence, 96]"]),
        (
            graph_of(
                kernels.fused_linear,
                {"x": X, "weight": WEIGHT},
                merged_n=[64, 32],
                out_grid="s8",
                outputs="value codes",
            ),
            [
                *("float32[batch, sequence, 64]", "int8[batch, sequence, 64]"),
                *("float32[batch, sequence, 32]", "int8[batch, sequence, 32]"),
            ],
        ),
        (
            graph_of(kernels.fused_norm, {"x": X}, out_grid="u8 asymmetric", outputs="sum codes scale zero_point"),
            [
                *("float32[batch, sequence, 32]", "uint8[batch, sequence, 32]"),
                *("float32[batch, sequence, 1]", "float32[batch, sequence, 1]"),
            ],
        ),
        (graph_of(kernels.fused_pointwise, {"x": QUERY}, heads=True), ["float32[batch, sequence, 32]"]),
        (
            graph_of(kernels.fused_attention, {"query": QUERY, "key": KEY, "value": KEY}),
            ["float32[batch, 4, sequence, 8]"],
        ),
        (
            graph_of(kernels.fused_attention, {"query": QUERY, "key": KEY, "value": KEY}, heads=True),
            ["float32[batch, sequence, 32]"],
        ),
        (
            graph_of(
                kernels.fused_embedding,
                {
                    "ids0": TensorType(torch.int64, (1, "sequence")),
                    "ids1": TensorType(torch.int64, ("batch", "sequence")),
                    "tables": WEIGHT,
                },
                lists=("ids", "tables"),
            ),
            ["float32[batch, sequence, 32]"],
        ),
    ],
)
def test_types_of_outputs(node: fx.Node, expected: list[str]) -> None:
    assert [str(output.type) for output in kernels.outputs(node)] == expected


def test_outputs_are_taken_out_by_getitem() -> None:
    node = graph_of(
        kernels.fused_linear, {"x": X, "weight": WEIGHT}, merged_n=[64, 32], out_grid="s8", outputs="value codes"
    )
    graph = node.graph
    taken = graph.call_function(operator.getitem, (node, 3))
    kernel, output = kernels.output_of(taken)
    assert (kernel, output.part, output.name) == (node, 1, "codes")
    for beyond in (4, 7, -1):
        assert kernels.output_of(graph.call_function(operator.getitem, (node, beyond))) is None
    assert kernels.output_of(node) is None
    assert kernels.read_outputs(node) == {(1, "codes"): taken}
    assert kernels.is_kernel(node)
    assert not kernels.is_kernel(taken)


def test_heads_of_unknown_number_have_no_joined_shape() -> None:
    node = graph_of(kernels.fused_pointwise, {"x": TensorType(FLOAT, ("batch", "heads", 3, 4))}, heads=True)
    with pytest.raises(AssertionError, match="symbolic shape"):
        kernels.outputs(node)
