import pytest
import torch

from bitlower.ir import BitlowerError
from bitlower.ir.subgraph import subgraph


def test_two_halves_make_the_whole(tiny_program):
    graph = tiny_program.graph
    inputs, outputs = graph.find_nodes(op="placeholder"), list(graph.output_node().args[0])
    [norm] = [node for node in graph.nodes if "layer_norm" in str(node.target)]
    first, second = subgraph(tiny_program.module, inputs, [norm]), subgraph(tiny_program.module, [norm], outputs)
    x = torch.randn(5, 16)
    expected = tiny_program.module(x)
    for mine, theirs in zip(second(*first(x)), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert {name for name, _ in second.named_parameters()} == {"head.weight", "head.bias"}
    assert second.head.weight is tiny_program.module.head.weight


def test_an_input_that_is_missing_is_named(tiny_program):
    outputs = list(tiny_program.graph.output_node().args[0])
    with pytest.raises(BitlowerError, match="which is not among its inputs"):
        subgraph(tiny_program.module, [], outputs)
