"""The text form: golden, stable, and with everything that one needs to know about a quantizer."""

import pytest
import torch
from torch import fx, nn

from bitlower.ir import Granularity, Grid, Quantizer, QuantSpec, ops, set_tensor
from bitlower.ir.text import format_node


def test_a_traced_program(exported, golden):
    golden("traced", str(exported))


def test_a_quantized_program(quantized, golden):
    golden("quantized", str(quantized))


def test_the_text_survives_clones_and_runs(exported, batch):
    before = str(exported)
    exported(**batch)
    twin = exported.clone()
    twin.recompile()
    assert str(twin) == str(exported) == before


def _quantizer_line(spec, scale, zero):
    grid = spec.grid
    root = fx.GraphModule(nn.Module(), fx.Graph())
    set_tensor(root, "scale", scale)
    set_tensor(root, "zero_point", zero)
    graph = fx.Graph()
    parameters = graph.get_attr("scale"), graph.get_attr("zero_point")
    x = graph.placeholder("x")
    node = graph.call_function(ops.fake_quantize, (x, *parameters, grid.quant_min, grid.quant_max))
    node.meta["quantizer"] = Quantizer("residual", spec, "x")
    return format_node(fx.GraphModule(root, graph), node)


def test_ranges_run_from_the_smallest_to_the_largest_value():
    spec = QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_embedding_group(2))
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[3.0, 12.0]])
    line = _quantizer_line(spec, scale, zero)
    assert line.endswith("# residual u4 asymmetric per-embedding-group(2) [-24, 6]")


def test_a_range_with_nan_shows():
    spec = QuantSpec(Grid(8), Granularity.per_tensor())
    assert _quantizer_line(spec, torch.tensor(float("nan")), torch.tensor(0.0)).endswith("[nan, nan]")


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (1.0, "1.0"),
        (0.1, "0.1"),
        (-3.4028234663852886e38, "-3.4028234663852886e+38"),
        (float("-inf"), "-inf"),
        (True, "True"),
        (None, "None"),
        ("none", "'none'"),
        ([1, (2, 0.5)], "[1, (2, 0.5)]"),
        (torch.int64, "int64"),
        (torch.strided, "strided"),
        (slice(0, 3), "slice(0, 3, None)"),
    ],
    ids=str,
)
def test_arguments(argument, text):
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"), argument), {"key": argument})
    module = fx.GraphModule(nn.Module(), graph)
    assert format_node(module, node) == f"%relu_default = relu(%x, {text}, key={text})"


def test_placeholders_and_tensors_take_no_line(quantized):
    for node in quantized.graph.nodes:
        assert bool(format_node(quantized.module, node)) == (node.op not in ("placeholder", "get_attr"))
