"""Permutation domains of real architectures and of operators one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program, Scheme
from bitlower.ir.dataflow import residual_sums
from bitlower.ir.permutation import domains
from bitlower.ir.permutation import rules as axis_rules
from bitlower.ir.permutation.domains import Domain, Domains
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.quantize import Quantize

FAMILIES = ["bert", "llama", "gemma", "gpt2", "opt", "opt-post-norm", "gpt-neox", "phi"]
DECODERS = FAMILIES[1:]
Family = Callable[[str], Program]


def named(found: Domains, name: str, axis: int) -> Domain:
    [domain] = found.at(name, axis)
    return domain


@pytest.mark.parametrize("name", FAMILIES)
def test_there_is_one_residual_stream_and_nothing_of_it_is_frozen(name: str, family: Family) -> None:
    program = family(name)
    [stream] = [domain for domain in domains.domains(program.module) if domain.residual]
    assert stream.structure == "free"
    assert stream.size == (36 if name == "phi" else 32)
    assert not stream.inputs
    assert [node.name for node, _ in stream.outputs] == (["layer_norm_4"] if name == "bert" else [])
    assert {(node, 2) for node in residual_sums(program.graph)} <= set(stream.values)


def test_the_stream_of_bert_holds_what_the_paper_permutes(family: Family) -> None:
    """Embedding columns, all norms, columns of what reads the stream, rows and biases of what writes it."""
    [stream] = [domain for domain in domains.domains(family("bert").module) if domain.residual]
    tables = {(f"embeddings.{kind}_embeddings.weight", 1) for kind in ("word", "position", "token_type")}
    norms = ["embeddings.LayerNorm"]
    reads, writes = {("pooler.dense.weight", 1)}, set()
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        reads |= {(f"{layer}.attention.self.{kind}.weight", 1) for kind in ("query", "key", "value")}
        reads |= {(f"{layer}.intermediate.dense.weight", 1)}
        for path in (f"{layer}.attention.output.dense", f"{layer}.output.dense"):
            writes |= {(f"{path}.weight", 0), (f"{path}.bias", 0)}
    vectors = {(f"{norm}.{kind}", 0) for norm in norms for kind in ("weight", "bias")}
    assert set(stream.parameters) == tables | vectors | reads | writes


def test_a_tied_table_is_one_parameter_whose_rows_stay(family: Family) -> None:
    found = domains.domains(family("llama").module)
    [stream] = [domain for domain in found if domain.residual]
    assert stream.parameters.count(("model.embed_tokens.weight", 1)) == 1
    rows = named(found, "model.embed_tokens.weight", 0)
    assert rows.structure == "frozen"
    assert rows.frozen == "embedding in model.embed_tokens looks its rows up by number"
    assert [node.target for node, _ in rows.outputs] == [torch.ops.aten.linear.default]


def test_grouped_queries_share_the_dimensions_of_a_value_head(family: Family) -> None:
    found = domains.domains(family("llama").module)
    heads, width = found.at("model.layers.0.self_attn.v_proj.weight", 0)
    assert (heads.size, width.size) == (2, 8)
    outer, repeats, inner = found.at("model.layers.0.self_attn.o_proj.weight", 1)
    assert (outer, inner, repeats.size) == (heads, width, 2)
    assert width.structure == "within"
    assert [node.name for node, _ in width.inputs] == ["past_key_values_0_value"]
    order = torch.arange(8).flip(0)
    spread = found.spread("model.layers.0.self_attn.o_proj.weight", 1, {width: order})
    assert torch.equal(spread.reshape(4, 8), torch.arange(32).reshape(4, 8).flip(1))


def test_rotary_pairs_stay_together(family: Family) -> None:
    """Both halves of a query or key head have one order, which is that of the rotary frequencies too."""
    found = domains.domains(family("llama").module)
    [frequencies] = found.at("model.rotary_emb.inv_freq", 0)
    assert frequencies.size == 4
    for kind in ("q_proj", "k_proj"):
        *_, pairs = found.at(f"model.layers.0.self_attn.{kind}.weight", 0)
        assert pairs is frequencies
    spread = found.spread("model.layers.0.self_attn.k_proj.weight", 0, {frequencies: torch.tensor([3, 2, 1, 0])})
    assert spread[:8].tolist() == [3, 2, 1, 0, 7, 6, 5, 4]


@pytest.mark.parametrize(("name", "projection"), [("gpt2", "c_attn"), ("gpt-neox", "query_key_value")])
def test_a_joint_projection_is_taken_apart(name: str, projection: str, family: Family) -> None:
    """Queries, keys and values of GPT-2 lie one after the other, those of GPT-NeoX in each head."""
    program = family(name)
    found = domains.domains(program.module)
    target = next(str(n.target) for n in program.graph.find_nodes(op="get_attr") if f"{projection}.weight" in n.target)
    parts = found.at(target, 0)
    [value] = [d for d in parts if d.size == 8 and any(node.name.endswith("_value") for node, _ in d.inputs)]
    order = torch.arange(8).flip(0)
    spread = found.spread(target, 0, {value: order})
    expected = (
        torch.arange(96).reshape(3, 4, 8) if name == "gpt2" else torch.arange(96).reshape(4, 3, 8).transpose(0, 1)
    )
    expected[2] = expected[2].flip(1)
    expected = expected if name == "gpt2" else expected.transpose(0, 1)
    assert torch.equal(spread, expected.reshape(-1))


@pytest.mark.parametrize("name", FAMILIES)
def test_inner_channels_are_free(name: str, family: Family) -> None:
    program = family(name)
    size = 128 if name == "gpt2" else 48
    inner = [d for d in domains.domains(program.module) if d.size == size and not d.residual]
    assert len(inner) == 2
    assert all(domain.structure == "free" and not domain.inputs and not domain.outputs for domain in inner)


@pytest.mark.parametrize("scheme", ["W8A8-full", "W8A8-peg4-full", "W4A16-g16"])
def test_quantizers_let_axes_pass(scheme: str, family: Family) -> None:
    """A scale an index has the order of the indices; one a block lets blocks move, and what is alike in all of them."""
    program = family("bert")
    before = [d for d in domains.domains(program.module) if d.residual]
    Quantize(scheme=Scheme.parse(scheme)).run(program, Context())
    program.recompile()
    streams = [d for d in domains.domains(program.module) if d.residual]
    assert not any(domain.frozen for domain in streams)
    product = 1
    for domain in streams:
        product *= domain.size
    assert product == before[0].size
    assert any(name.startswith("quantizers.") for d in domains.domains(program.module) for name, _ in d.parameters)


class Operation(nn.Module):
    """Two linears with ``function`` between them."""

    def __init__(self, function: Callable, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(width, 6)
        self.register_buffer("vector", torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self, self.first(x)))


def between(function: Callable, width: int = 12) -> tuple[Domains, tuple[Domain, ...], tuple[Domain, ...]]:
    """All domains, those of the first layer's rows and those of the second's columns."""
    program = load(Operation(function, width).eval(), example_inputs={"x": torch.randn(2, 3, 6)})
    Clean().run(program, Context())
    program.recompile()
    found = domains.domains(program.module)
    return found, found.at("first.weight", 0), found.at("second.weight", 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.relu(x) * m.vector + 1,
        lambda m, x: x.softmax(-1),
        lambda m, x: nn.functional.layer_norm(x, [12]),
        lambda m, x: x - x.mean(-1, keepdim=True),
        lambda m, x: x.transpose(1, 2).transpose(1, 2),
        lambda m, x: x.reshape(x.shape[0], -1, 1, 12).squeeze(2),
        lambda m, x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda m, x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
        lambda m, x: x.sum(1, keepdim=True) + x.amax(1, keepdim=True),
        lambda m, x: (x[..., None, None] @ m.vector[:, None, None]).flatten(2),
    ],
)
def test_operators_that_permutations_pass(function: Callable) -> None:
    _, before, after = between(function)
    assert before == after
    assert [(domain.size, domain.structure) for domain in before] == [(12, "free")]


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda m, x: x.view(x.shape[0], -1, 3, 4).relu().flatten(2), [3, 4]),
        (lambda m, x: torch.cat([x[..., 4:], x[..., :4]], -1), [4, 8]),
        (lambda m, x: torch.cat(x.split([3, 9], -1), -1), [3, 9]),
        (lambda m, x: torch.cat([x[..., :5].relu(), x[..., 5:]], -1), [5, 7]),
        (lambda m, x: x + x[..., 3:4].expand(-1, -1, 12), [3, 8]),
    ],
)
def test_parts_of_an_axis_are_domains(function: Callable, sizes: list[int]) -> None:
    _, before, after = between(function)
    assert [domain.size for domain in before] == sizes
    assert set(before) == set(after)
    assert all(domain.structure == "within" for domain in before)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x.cumsum(-1), "cumsum"),
        (lambda m, x: x.flip(-1), "flip"),
        (lambda m, x: x[..., ::2].repeat(1, 1, 2), "takes out a part of it"),
        (lambda m, x: x * torch.arange(12), "arange"),
        (lambda m, x: x + x[..., 3].unsqueeze(-1), "takes out an entry of it"),
    ],
)
def test_what_depends_on_the_order_freezes_it(function: Callable, reason: str) -> None:
    _, before, _ = between(function)
    assert before
    for domain in before:
        assert domain.structure == "frozen"
        assert reason in domain.frozen


def test_entries_that_are_repeated_follow_their_order() -> None:
    _, before, after = between(lambda m, x: x.repeat_interleave(2, -1), 24)
    assert [(domain.size, domain.structure) for domain in before] == [(12, "within")]
    assert set(before) < set(after)


def test_the_product_of_two_activations_ties_what_it_sums_over() -> None:
    _, before, after = between(lambda m, x: (x @ x.transpose(1, 2)) @ x)
    assert before == after
    assert before[0].structure == "free"


def test_an_argument_is_found_where_it_is_given_by_name(family: Family) -> None:
    program = family("llama")
    before = [(domain.size, domain.frozen, len(domain.values)) for domain in domains.domains(program.module)]
    head = next(reversed(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    head.args, head.kwargs = head.args[:1], {"weight": head.args[1]}
    after = [(domain.size, domain.frozen, len(domain.values)) for domain in domains.domains(program.module)]
    assert after == before


def test_no_model_is_known_by_name() -> None:
    for module in (domains, axis_rules):
        source = inspect.getsource(module).lower()
        assert not [name for name in ("bert", "llama", "gpt", "opt.", "self_attn") if name in source]
