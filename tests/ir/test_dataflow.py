"""Views of real graphs: BERT in both attention forms, a GPT-2 and a Llama in miniature, a plain MLP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn
from transformers import BertConfig, BertModel

from bitlower.frontends import load
from bitlower.ir import Program, Scheme, ops
from bitlower.ir.blocks import blocks, cut_points
from bitlower.ir.dataflow import (
    ATTENTION,
    LINEAR,
    activations,
    fusion_groups,
    linears,
    liveness,
    parameter_of,
    residual_sums,
    value_graph,
    value_root,
    value_uses,
)
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode, operand, value_operands
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.quantize import Quantize

aten = torch.ops.aten
WIDTH, HEADS, LAYERS = 16, 2, 3


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: two products, summed."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class LlamaBlock(nn.Module):
    """Pre-norm, rotary positions, explicit attention with an additive causal mask, gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(), RMSNorm()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n = self.first(x)
        q, k, v = (f(n).view(*n.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(context)
        n = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(layers))
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        mask = torch.full((ids.shape[1], ids.shape[1]), -1e9).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


class GptBlock(nn.Module):
    """Pre-norm, one linear for query, key and value, a learned bias that is added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH)
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.first(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        context = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.proj(context.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.second(x)) + self.bias))


class Gpt(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, WIDTH), nn.Embedding(30, WIDTH)
        self.layers = nn.ModuleList(GptBlock() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) + self.side.bias


def bert(attention: str) -> Program:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=32,
        max_position_embeddings=30, attn_implementation=attention,
    )  # fmt: skip
    return load(BertModel(config))


def trace(name: str) -> Program:
    if name in ("sdpa", "eager"):
        return bert(name)
    torch.manual_seed(0)
    if name == "mlp":
        return load(Mlp(), example_inputs={"x": torch.randn(3, 8)})
    model = Llama() if name == "llama" else Gpt()
    return load(model, example_inputs={"ids": torch.randint(0, 50, (2, 6))})


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {name: trace(name) for name in ("sdpa", "eager", "llama", "gpt", "mlp")}


def batch_for(program: Program, rows: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if program.inputs[0].name == "x":
        return {"x": torch.randn(rows, 8, generator=generator)}
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    extra = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, **extra} if program.inputs[0].name == "input_ids" else {"ids": ids}


def paths(nodes: list[fx.Node] | tuple[fx.Node, ...]) -> list[str]:
    return [str(node.meta.get("path", "")) for node in nodes]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_bert_has_two_residual_sums_a_layer(programs, name: str) -> None:
    expected = [f"encoder.layer.{i}.{part}output" for i in range(LAYERS) for part in ("attention.", "")]
    assert paths(residual_sums(programs[name].graph)) == expected


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_positions_masks_and_biases_are_no_residual_sums(programs, name: str) -> None:
    """The graphs hold many more additions: rotary (two a layer), mask, bias, embeddings, the norm's epsilon."""
    graph = programs[name].graph
    additions = [n for n in graph.nodes if n.target is aten.add.Tensor]
    found = residual_sums(graph)
    assert paths(found) == [f"layers.{i}" for i in range(LAYERS) for _ in range(2)]
    assert len(additions) > len(found)
    assert all({value_root(term) for term in value_operands(n)} & set(found) for n in found[1:])


def test_residual_sum_of_an_mlp(programs) -> None:
    """``x + down(…)`` is one, the parameter that is added to it is none."""
    (found,) = residual_sums(programs["mlp"].graph)
    assert found.args[0].op == "placeholder"
    assert value_root(operand(found, "other")).target is aten.linear.default


def test_residual_sums_are_found_behind_quantizers(programs) -> None:
    program = programs["sdpa"].clone()
    Quantize(Scheme.parse("W8A8-full")).run(program, Context())
    assert len(residual_sums(program.graph)) == 2 * LAYERS


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_query_key_and_value_form_a_group(programs, name: str) -> None:
    groups = [paths(group) for group in fusion_groups(programs[name].graph) if len(group) > 1]
    parts = ("query", "key", "value")
    assert groups == [[f"encoder.layer.{i}.attention.self.{part}" for part in parts] for i in range(LAYERS)]


def test_gate_and_up_form_a_group(programs) -> None:
    groups = [paths(group) for group in fusion_groups(programs["llama"].graph) if len(group) > 1]
    parts = (("q", "k", "v"), ("gate", "up"))
    assert groups == [[f"layers.{i}.{p}" for p in names] for i in range(LAYERS) for names in parts]


def test_groups_hold_each_linear_once_and_survive_quantization(programs) -> None:
    program = programs["llama"].clone()
    before = [paths(group) for group in fusion_groups(program.graph)]
    assert sorted(path for group in before for path in group) == sorted(paths(linears(program.graph)))
    Quantize(Scheme.parse("W8A8")).run(program, Context())
    assert [paths(group) for group in fusion_groups(program.graph)] == before


def levels(program: Program, scheme: str) -> dict[str, Program]:
    """The program at all levels; per-token activations need no calibration, weights get the scale 1 by hand."""
    simulated = program.clone()
    Quantize(Scheme.parse(scheme)).run(simulated, Context())
    simulated.recompile()
    integer = simulated.clone()
    for node in integer.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        view = QuantizerNode(node)
        if view.is_static:
            scale, zero_point = view.range(integer.module)
            view.set_range(integer.module, torch.ones_like(scale), zero_point)
    LowerInteger().run(integer, Context())
    integer.recompile()
    return {"float": program, "simulated": simulated, "integer": integer}


@pytest.mark.parametrize("level", ["float", "simulated", "integer"])
@pytest.mark.parametrize("name", ["sdpa", "eager", "llama", "gpt"])
def test_a_block_alone_gives_the_values_of_the_whole(programs, name: str, level: str) -> None:
    """Whoever runs the nodes of a block on its source alone (and on what depends on no parameter) gets its output."""
    program = levels(programs[name], "W8A8-token")[level]
    found = blocks(program.module)
    assert len(found) == LAYERS
    assert [b.source for b in found[1:]] == [b.output for b in found[:-1]]
    assert all(
        sum(n.target in LINEAR for n in b.nodes) == sum(n.target in LINEAR for n in found[0].nodes) for b in found
    )
    floats = activations(program.module)
    values: dict[fx.Node, object] = {}
    observe(program, list(program.graph.nodes)[:-1], [batch_for(program)], lambda n, v, _: values.__setitem__(n, v))
    for part in found:
        known = {n: v for n, v in values.items() if n not in floats} | {part.source: values[part.source]}
        for node in part.nodes:
            if node not in known:
                args, kwargs = (fx.node.map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
                known[node] = node.target(*args, **kwargs)
        assert torch.equal(known[part.output], values[part.output])


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_blocks_of_bert_are_its_layers(programs, name: str) -> None:
    found = blocks(programs[name].module)
    for i, part in enumerate(found):
        inside = {path for path in paths(part.nodes) if path.startswith("encoder.layer.")}
        assert {path.split(".")[2] for path in inside} == {str(i)}
        assert part.output.meta["path"] == f"encoder.layer.{i}.output.LayerNorm"
    assert found[0].source.meta["path"] == "embeddings.LayerNorm"


@pytest.mark.parametrize(("model", "linears_of_a_layer"), [(Llama, 7), (Gpt, 4)])
def test_the_only_block_has_the_whole_layer(model: type[nn.Module], linears_of_a_layer: int) -> None:
    """There is no block before it to compare with, and its attention part alone would end in a value of its type."""
    program = load(model(layers=1), example_inputs={"ids": torch.randint(0, 50, (2, 6))})
    [part] = blocks(program.module)
    assert sum(node.target in LINEAR for node in part.nodes) == linears_of_a_layer


class Scaled(nn.Module):
    """A linear whose weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.gain)


def test_what_is_computed_from_parameters_alone_is_no_activation() -> None:
    program = load(Scaled(), example_inputs={"x": torch.randn(3, 8)})
    assert {node.target for node in activations(program.module)} == {aten.linear.default}


def test_an_mlp_has_no_blocks(programs) -> None:
    assert blocks(programs["mlp"].module) == []


@pytest.mark.parametrize("name", ["sdpa", "llama", "gpt", "mlp"])
def test_nothing_but_the_cut_value_crosses_a_cut(programs, name: str) -> None:
    """After a cut point, no later node computes with an activation from before it."""
    program = programs[name]
    nodes, floats = list(program.graph.nodes)[:-1], activations(program.module)
    position = {n: i for i, n in enumerate(nodes)}
    cuts = cut_points(program.module)
    for node in nodes:
        for source in floats & set(node.all_input_nodes):
            assert not [c for c in cuts if position[source] < position[c] < position[node]], (source, node)
    assert set(cuts) <= floats


def test_activations_are_what_parameters_touch(programs) -> None:
    program = programs["llama"]
    floats = activations(program.module)
    assert all(n in floats for n in linears(program.graph))
    sines = [n for n in program.graph.nodes if n.target in (aten.sin.default, aten.cos.default, aten.triu.default)]
    assert sines
    assert not floats & set(sines)


def test_quantized_weights_are_no_activations(programs) -> None:
    program = levels(programs["sdpa"], "W8A8")["simulated"]
    weights = [n for n, q in program.quantizers() if q.role.endswith(("weight", "table"))]
    assert weights
    assert not set(weights) & activations(program.module)


@pytest.mark.parametrize("name", ["sdpa", "llama"])
def test_liveness_is_what_a_run_that_frees_values_holds(programs, name: str) -> None:
    """An interpreter that drops each value after its last use holds just those values."""
    graph = programs[name].graph
    nodes = list(graph.nodes)
    for position, alive in enumerate(liveness(graph)):
        later = {s for n in nodes[position + 1 :] for s in n.all_input_nodes}
        expected = {n for n in nodes[: position + 1] if n in later and n.op in ("placeholder", "call_function")}
        assert alive == expected


def test_value_root_looks_through_views_and_quantizers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    computed = graph.call_function(aten.relu.default, (x,))
    turned = graph.call_function(aten.transpose.int, (computed, 0, 1))
    rounded = graph.call_function(ops.fake_quantize, (turned, x, x, 0, 255))
    viewed = graph.call_function(aten.view.default, (rounded, [2, 3]))
    product = graph.call_function(aten.mul.Tensor, (viewed, computed))
    graph.output((product, turned))
    assert value_root(viewed) is computed
    assert value_root(product) is product
    assert value_uses(computed) == [(turned, rounded), (turned, graph.output_node()), (computed, product)]


def test_parameter_of_finds_weights_only(programs) -> None:
    for node in linears(programs["gpt"].graph):
        parameter = parameter_of(LinearNode(node).weight)
        assert parameter is not None
        assert str(parameter.target) == f"{node.meta['path']}.weight"
        assert parameter_of(LinearNode(node).x) is None


def test_addmm_has_its_operands_elsewhere() -> None:
    class Conv1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    program = load(Conv1d(), example_inputs={"x": torch.randn(3, 4)})
    (node,) = linears(program.graph)
    assert LinearNode(node).x.op == "placeholder"
    assert parameter_of(LinearNode(node).weight).target == "weight"


def test_a_product_of_activations_is_no_linear(programs) -> None:
    graph = programs["eager"].graph
    assert len(linears(graph)) == 6 * LAYERS + 1
    assert sum(n.target in ATTENTION for n in programs["sdpa"].graph.nodes) == LAYERS


def test_value_graph_has_the_edges_of_the_graph(programs) -> None:
    graph = programs["mlp"].graph
    view = value_graph(graph)
    assert set(view.nodes) == set(graph.nodes)
    assert all(set(view.successors(n)) == set(n.users) for n in graph.nodes)
