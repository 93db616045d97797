"""Where quantizers go: the table of Bondarenko et al. §3, tied weights, patterns, granularities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Granularity, Grid, Program, QuantSpec, Scheme, get_tensor, ops
from bitlower.ir.dataflow import LINEAR, VIEWS, linears
from bitlower.ir.operators import LinearNode
from bitlower.ir.verifier import verify
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers._placement import input_sites, value_sites, weight_sites
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize

LAYER = (
    *("linear-output",) * 3,
    *("scores", "probs", "context", "linear-output", "residual", "norm", "activation", "linear-output"),
    *("residual", "norm"),
)
"""The 13 activation quantizers of a layer, in execution order."""


def quantize(program: Program, scheme: Scheme | str, **patterns: tuple[str, ...]) -> tuple[Program, PlacementReport]:
    result, context = program.clone(), Context()
    pass_ = Quantize(Scheme.parse(scheme) if isinstance(scheme, str) else scheme, **patterns)
    pass_.run(result, context)
    result.level = pass_.ensures or result.level
    result.recompile()
    verify(result)
    return result, context[PlacementReport]


def roles(program: Program, *, weights: bool) -> list[str]:
    found = [quantizer.role for _, quantizer in program.quantizers()]
    return [role for role in found if role.endswith(("weight", "table")) == weights]


@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_full_placement_of_bert_base(bert, run, attention: str, cleaned: bool) -> None:
    """161 activation and 102 weight quantizers, in the order of the paper's figure 1."""
    _, program = bert(layers=12, attention=attention, labels=3)
    if cleaned:
        program = run(program, Clean())
    result, report = quantize(program, "W8A8-full")
    assert roles(result, weights=False) == ["embedding-sum"] * 2 + ["norm"] + [*LAYER * 12, "activation", "logits"]
    assert Counter(roles(result, weights=True)) == {"linear-weight": 74, "embedding-table": 3, "norm-weight": 25}
    assert len(roles(result, weights=False)) == 161
    assert sum(bool(row.spec) for row in report.rows) == 161 + 102


def test_each_layer_has_its_13(bert) -> None:
    _, program = bert(layers=12)
    result, _ = quantize(program, "W8A8-full")
    for layer in range(12):
        prefix = f"bert.encoder.layer.{layer}."
        activations = [
            (node, q) for node, q in result.quantizers() if q.role in LAYER and node.meta["path"].startswith(prefix)
        ]
        assert tuple(q.role for _, q in activations) == LAYER


def test_the_full_placement_sits_where_the_paper_says(bert) -> None:
    """Scores before scaling and mask, GELU after it, residual sums after the addition."""
    _, program = bert(layers=1)
    result, _ = quantize(program, "W8A8-full")
    by_role: dict[str, list[fx.Node]] = {}
    for node, quantizer in result.quantizers():
        by_role.setdefault(quantizer.role, []).append(node)
    aten = torch.ops.aten
    sources = {role: {node.args[0].target for node in nodes} for role, nodes in by_role.items()}
    assert sources["scores"] == sources["context"] == {aten.matmul.default}
    assert {user.target for node in by_role["scores"] for user in node.users} == {aten.mul.Tensor}
    assert sources["activation"] == {aten.gelu.default, aten.tanh.default}
    assert sources["residual"] == sources["embedding-sum"] == {aten.add.Tensor}
    gelu = next(n for n in result.graph.nodes if n.target is aten.gelu.default)
    assert gelu.args[0].target is aten.linear.default


@pytest.mark.parametrize(
    ("scheme", "weights", "activations"),
    [("W8A8", 12 + 2 + 3, {"linear-input": 10}), ("W4A16", 14, {}), ("W16A8", 0, {"linear-input": 10})],
)
def test_the_linear_placement(bert, scheme: str, weights: int, activations: dict[str, int]) -> None:
    """A layer's inputs: one for query, key and value, one for the output, two for the feed-forward; pooler and head."""
    _, program = bert(layers=2)
    result, _ = quantize(program, scheme)
    assert len(roles(result, weights=True)) == weights
    assert Counter(roles(result, weights=False)) == activations
    for node in linears(program.graph):
        twin = next(n for n in result.graph.nodes if n.name == node.name)
        assert (LinearNode(twin).x.target is ops.fake_quantize) == bool(activations)
        assert (LinearNode(twin).weight.target is ops.fake_quantize) == bool(weights)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids)))


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(0)
    return load(Tied(), example_inputs={"ids": torch.arange(6).reshape(2, 3)})


def test_a_tied_parameter_has_one_quantizer(tied: Program) -> None:
    result, report = quantize(tied, "W8A8")
    (node,) = [n for n, q in result.quantizers() if q.role == "embedding-table"]
    assert "linear-weight" not in roles(result, weights=True)
    assert {user.target for user in node.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}
    assert [row.role for row in report.rows if row.spec] == ["embedding-table", "linear-input"]


def test_one_reader_of_a_tied_parameter_can_be_left_out(tied: Program) -> None:
    result, _ = quantize(tied, "W8A8", ignore=("head",))
    (node,) = [n for n, _ in result.quantizers()]
    assert [user.target for user in node.users] == [torch.ops.aten.embedding.default]
    (head,) = linears(result.graph)
    assert LinearNode(head).weight.op == "get_attr"


def test_a_weight_behind_a_view_is_quantized() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.t())

    program = load(Turned(), example_inputs={"x": torch.randn(3, 8)})
    result, _ = quantize(program, "W8A8")
    assert roles(result, weights=True) == ["linear-weight"]
    (linear,) = linears(result.graph)
    assert LinearNode(linear).weight.args[0].target is ops.fake_quantize


def test_a_quantizer_over_an_input_belongs_to_its_reader() -> None:
    program = load(nn.Sequential(nn.Linear(8, 4)), example_inputs={"input": torch.randn(3, 8)})
    result, report = quantize(program, "W8A8")
    (node,) = [n for n, q in result.quantizers() if q.role == "linear-input"]
    assert node.meta["path"] == "0"
    assert node.meta["quantizer"].tensor == "input_1"
    assert [(row.path, row.tensor) for row in report.rows if row.spec] == [("0", "0.weight"), ("0", "input_1")]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("bert.pooler", {"bert.pooler.dense"}),
        ("*pooler*", {"bert.pooler.dense"}),
        (
            "re:.*\\.1\\.(intermediate|output)\\.dense",
            {f"bert.encoder.layer.1.{p}.dense" for p in ("intermediate", "output")},
        ),
        ("classifier.weight", {"classifier"}),
    ],
)
def test_ignored_linears_keep_float_weights(bert, pattern: str, left: set[str]) -> None:
    _, program = bert()
    result, report = quantize(program, "W8A8", ignore=(pattern,))
    float_weights = {n.meta["path"] for n in linears(result.graph) if LinearNode(n).weight.op == "get_attr"}
    assert float_weights == left
    reasons = {row.reason for row in report.rows if row.role == "linear-weight" and row.path in left}
    assert reasons == {"ignored by a pattern"}


def test_an_ignored_reader_reads_the_float_value(bert) -> None:
    """Query, key and value read one value; the one that is ignored reads it unrounded."""
    _, program = bert(layers=1)
    result, _ = quantize(program, "W8A8", ignore=("*.query",))
    by_path = {n.meta["path"].rpartition(".")[2]: n for n in linears(result.graph)}
    key, query = LinearNode(by_path["key"]).x, LinearNode(by_path["query"]).x
    assert key.target is ops.fake_quantize
    assert key.args[0] is query


def test_targets_admit_what_they_name_and_nothing_else(bert) -> None:
    _, program = bert()
    result, report = quantize(program, "W8A8-full", targets=("bert.encoder.layer.1",))
    paths = {node.meta["path"] for node, _ in result.quantizers()}
    assert all(path.startswith("bert.encoder.layer.1") for path in paths)
    assert tuple(roles(result, weights=False)) == LAYER
    outside = [row.reason for row in report.rows if not row.path.startswith("bert.encoder.layer.1")]
    assert set(outside) == {"no target pattern matches", "the scheme leaves linear-input in float"}
    attentions = [n for n in result.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert [n.meta["path"] for n in attentions] == ["bert.encoder.layer.0.attention.self"]


def test_ignore_wins_over_targets(bert) -> None:
    _, program = bert()
    result, _ = quantize(program, "W8A8", targets=("bert.encoder",), ignore=("bert.encoder.layer.0",))
    readers = {user.meta["path"] for node, _ in result.quantizers() for user in node.users}
    assert {path.rpartition("layer.")[2][:1] for path in readers} == {"1"}


@pytest.mark.parametrize("kind", ["ignore", "targets"])
def test_a_pattern_that_matches_nothing_is_an_error(bert, kind: str) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match=f"the {kind} pattern 'bert.poler.dense' matches nothing") as error:
        quantize(program, "W8A8", **{kind: ("bert.poler.dense",)})
    assert error.value.hint == "did you mean 'bert.pooler.dense'?"


def test_a_scheme_that_quantizes_nothing_is_an_error(bert) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match="the scheme W16A16 quantizes nothing"):
        quantize(program, "W16A16")


def test_the_report_says_why_a_tensor_stays_float(bert) -> None:
    _, program = bert(layers=1)
    _, report = quantize(program, "W8A8")
    by_role: dict[str, set[str]] = {}
    for row in report.rows:
        by_role.setdefault(row.role, set()).add(row.reason)
    assert by_role["linear-weight"] == by_role["linear-input"] == by_role["embedding-table"] == {""}
    for role in ("norm", "norm-weight", "residual", "context", "embedding-sum", "linear-output", "logits"):
        assert by_role[role] == {f"the scheme leaves {role} in float"}
    assert {row.spec for row in report.rows if row.role == "linear-input"} == {"u8 asymmetric per-tensor"}


@pytest.mark.parametrize("scheme", ["W8A8-token", "W8A8-token-full"])
def test_per_token_scales_are_computed_from_the_value_itself(bert, scheme: str) -> None:
    _, program = bert()
    result, _ = quantize(program, scheme)
    found = [n for n, q in result.quantizers() if q.spec.granularity.dynamic]
    assert len(found) == (31 if "full" in scheme else 10)
    for node in found:
        value, scale, zero = node.args[:3]
        assert [part.args[1] for part in (scale, zero)] == [0, 1]
        assert scale.args[0] is zero.args[0]
        assert scale.args[0].target is ops.choose_qparams
        assert scale.args[0].args[0] is value
    static = [n.target for n in result.graph.find_nodes(op="get_attr") if "quantizers" in str(n.target)]
    assert len(static) == 2 * len(roles(result, weights=True))


def test_a_view_of_a_rounded_value_is_not_rounded_again(bert) -> None:
    """The context is quantized per head; its transpose and reshape lead to a linear without a second quantizer."""
    spec = Scheme.parse("W8A8").activations
    scheme = Scheme(roles=("linear-weight", "linear-input", "context"), overrides=(("context", spec),))
    _, program = bert(layers=1)
    result, report = quantize(program, scheme)
    linear = next(n for n in linears(result.graph) if n.meta["path"].endswith("attention.output.dense"))
    value, views = LinearNode(linear).x, 0
    while value.target in VIEWS:
        value, views = value.args[0], views + 1
    assert views >= 2
    assert value.meta["quantizer"].role == "context"
    rounded = [n for n, q in result.quantizers() if q.role in ("linear-input", "context")]
    assert len(rounded) == 6
    assert len([row for row in report.rows if row.role == "linear-input"]) == 5


@pytest.mark.parametrize(
    ("scheme", "tensor"),
    [
        ("W8A8-peg5", r"layer_norm \(linear-input\): per-embedding-group\(5\) does not divide an axis of 32"),
        ("W4A16-g20", r"bert\..*\.weight \(linear-weight\): per-group\(20\) and an axis of 32"),
    ],
)
def test_a_granularity_that_does_not_fit_names_the_tensor(bert, scheme: str, tensor: str) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match=tensor):
        quantize(program, scheme)


@pytest.mark.parametrize(
    ("scheme", "weight", "value"),
    [
        ("W8A8", (64, 1), ()),
        ("W8A8-tensor", (), ()),
        ("W4A8-g16", (64, 2), ()),
        ("W8A8-peg4", (64, 1), (1, 1, 4)),
    ],
)
def test_open_scales_have_the_shape_of_their_granularity(bert, scheme: str, weight: tuple, value: tuple) -> None:
    _, program = bert(layers=1)
    result, _ = quantize(program, scheme)
    linear = next(n for n in linears(result.graph) if n.meta["path"].endswith("intermediate.dense"))
    for node, shape in ((LinearNode(linear).weight, weight), (LinearNode(linear).x, value)):
        for part in node.args[1:3]:
            assert get_tensor(result.module, part.target).shape == shape
            assert not get_tensor(result.module, part.target).any()
            assert part.target.rpartition(".")[0] == f"quantizers.{node.args[0].name}"


def test_gates_are_rounded_once() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    program = load(Gated(), example_inputs={"x": torch.randn(3, 8)})
    result, report = quantize(program, "W8A8-full")
    (node,) = [n for n, q in result.quantizers() if q.role == "activation"]
    assert node.args[0].target is torch.ops.aten.mul.Tensor
    assert Counter(row.role for row in report.rows if row.spec) == {"linear-weight": 3, "activation": 1, "logits": 1}


def test_sites_are_listed_without_a_change(bert) -> None:
    _, program = bert(layers=1, labels=0)
    before = str(program)
    sites = [*weight_sites(program.graph), *value_sites(program.graph), *input_sites(program.graph)]
    assert str(program) == before
    tensors = [(site.role, site.tensor) for site in sites]
    assert len(set(tensors)) == len(tensors)
    names = {name.removeprefix("model/") for name, _ in program.tensors()}
    assert {site.tensor for site in sites if site.value.op == "get_attr"} <= names
    assert all(site.edges and set(site.edges) <= set(site.value.users) for site in input_sites(program.graph))


def test_a_site_of_several_linears_lists_all_their_paths(bert) -> None:
    _, program = bert(layers=1)
    first = next(input_sites(program.graph))
    assert [path.rpartition(".")[2] for path in first.paths] == ["query", "key", "value"]
    assert all(edge.target in LINEAR for edge in first.edges)


def test_quantizers_follow_their_value(bert) -> None:
    """The graph stays in order, for every kind of quantizer."""
    _, program = bert(layers=1)
    for scheme in ("W8A8-token-full", "W8A8-full"):
        result, _ = quantize(program, scheme)
        result.graph.lint()


def test_bits_of_single_roles_can_differ(bert) -> None:
    wide = QuantSpec(Grid(16, signed=False, symmetric=False), Granularity.per_tensor())
    full = Scheme.parse("W8A8-full")
    scheme = Scheme(full.weights, full.activations, full.embeddings, full.roles, (("residual", wide), ("probs", None)))
    _, program = bert(layers=2)
    result, _ = quantize(program, scheme)
    assert {q.spec.grid.bits for _, q in result.quantizers() if q.role == "residual"} == {16}
    assert {q.spec.grid.bits for _, q in result.quantizers() if q.role == "norm"} == {8}
    assert "probs" not in roles(result, weights=False)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_language_model_has_the_role_of_its_table(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    program = load(LlamaForCausalLM(config))
    roles = {site.tensor: site.role for site in weight_sites(program.graph)}
    tables = [name for name, role in roles.items() if role == "embedding-table"]
    assert tables == ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert roles["model.layers.0.mlp.up_proj.weight"] == "linear-weight"  # of the same shape, and no head
    sites = {site.tensor: site for site in weight_sites(program.graph)}
    assert len(sites["model.embed_tokens.weight"].edges) == 1 + tied
