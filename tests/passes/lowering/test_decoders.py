"""Tiny decoders of ten families through clean, the views of the graph, and the placement of quantizers."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
import transformers
from torch import fx, nn
from transformers import AutoModelForCausalLM

from bitlower.frontends import load
from bitlower.ir import Program, Scheme
from bitlower.ir.blocks import blocks, cut_points
from bitlower.ir.dataflow import (
    LINEAR,
    activations,
    fusion_groups,
    is_scores,
    linears,
    residual_sums,
)
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.passes import Context
from bitlower.passes._machinery.manager import PassManager
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize

aten = torch.ops.aten
VOCABULARY, LAYERS = 96, 2
NEW = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = {"num_key_value_heads": 2}
# Where tests/passes/lowering/test_fuse.py has the same family, the configuration is the same: one trace serves both.
CONFIGURATIONS = {
    "llama": ("LlamaConfig", NEW | GQA | {"tie_word_embeddings": True}),
    "llama-eager": ("LlamaConfig", NEW | GQA | {"attn_implementation": "eager"}),
    "qwen2": ("Qwen2Config", NEW | GQA),
    "mistral": ("MistralConfig", NEW | GQA | {"sliding_window": None}),
    "gemma": ("GemmaConfig", NEW | {"num_key_value_heads": 1, "head_dim": 8}),
    "phi3": ("Phi3Config", NEW | GQA),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
                            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "opt": ("OPTConfig", OPT | {"word_embed_proj_dim": 32}),
    "opt-post-norm": ("OPTConfig", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": ("PhiConfig", NEW),
    "gpt-neox": ("GPTNeoXConfig", NEW),
}  # fmt: skip
PARALLEL = ("phi", "gpt-neox")
"""Attention and feed-forward side by side: one residual sum a layer."""
GROUPS = {
    "gpt2": [1, 1, 1, 1], "gpt-neox": [1, 1, 1, 1], "phi3": [1, 1, 1, 1], "opt": [3, 1, 1, 1],
    "opt-post-norm": [3, 1, 1, 1], "phi": [4, 1, 1],
}  # fmt: skip
"""Linears that share an input, layer by layer; the Llama family has query/key/value, output, gate/up, down."""
LLAMAS = [3, 1, 2, 1]


@cache
def traced(name: str) -> tuple[nn.Module, Program]:
    kind, settings = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key or "ln_" in key:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model, load(model)


@cache
def cleaned(name: str) -> Program:
    return PassManager([Clean()]).run(traced(name)[1], Context(calibration=[batch(name)]))


def batch(name: str, rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Tokens without a past; the first row is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    names = {spec.name for spec in traced(name)[1].inputs}
    return {key: value for key, value in given.items() if key in names}


def count(program: Program) -> Counter[object]:
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] if n == "mistral" else []) for n in CONFIGURATIONS]
)


@every
def test_clean_leaves_one_form(name: str) -> None:
    found = count(cleaned(name))
    gone = {
        aten.addmm.default, aten.view.default, aten.rsqrt.default, aten.softmax.int, aten.matmul.default,
        aten.tanh.default, aten.pow.Tensor_Scalar, aten.to.dtype_layout,
    }  # fmt: skip
    assert not gone & set(found)
    assert found[aten.scaled_dot_product_attention.default] == LAYERS
    norms = 3 if name == "phi" else 4 if name == "opt-post-norm" else 2 * LAYERS + 1
    rms = name in ("llama", "llama-eager", "qwen2", "mistral", "gemma", "phi3")
    assert found[aten.rms_norm.default if rms else aten.layer_norm.default] == norms
    outer = 3 if name == "opt-post-norm" else 1
    assert len(linears(cleaned(name).graph)) == LAYERS * sum(GROUPS.get(name, LLAMAS)) + outer


@every
def test_clean_keeps_the_numbers_with_and_without_a_past(name: str) -> None:
    """Prefill, then two steps with the cache that it gave."""
    model, _ = traced(name)
    program = cleaned(name)
    given = batch(name, rows=2, length=6)
    with torch.no_grad():
        kept = model(**given, use_cache=True)
    found = program(**given)
    torch.testing.assert_close(found["logits"], kept.logits, atol=1e-5, rtol=1e-4)
    mask = torch.cat([given["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], 1)
    ids = torch.tensor([[5, 6], [7, 8]])
    step = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, 6:]}
    step = {key: value for key, value in step.items() if key in given}
    past = {key.replace("present", "past_key_values"): value for key, value in found.items() if key != "logits"}
    with torch.no_grad():
        expected = model(**step, past_key_values=kept.past_key_values).logits
    torch.testing.assert_close(program(**step, **past)["logits"], expected, atol=1e-5, rtol=1e-4)


@every
def test_grouped_queries_read_the_cache_as_it_is(name: str) -> None:
    nodes = cleaned(name).graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    for node in nodes:
        assert node.args[1].target is node.args[2].target is aten.cat.default
        grouped = node.args[1].meta["type"].shape[1] < 4
        assert bool(node.kwargs.get("enable_gqa")) == grouped == ("num_key_value_heads" in CONFIGURATIONS[name][1])


@every
def test_blocks_are_the_layers(name: str) -> None:
    program = cleaned(name)
    found = blocks(program.module)
    assert len(found) == LAYERS
    assert [b.source for b in found[1:]] == [b.output for b in found[:-1]]
    for layer, part in enumerate(found):
        inside = {str(n.meta.get("path", "")) for n in part.nodes if n.target in LINEAR}
        assert {next(p for p in path.split(".") if p.isdigit()) for path in inside} == {str(layer)}
        assert sum(n.target in LINEAR for n in part.nodes) == sum(GROUPS.get(name, LLAMAS))


@every
def test_a_block_alone_gives_the_values_of_the_whole(name: str) -> None:
    """Its source, the past and what depends on no parameter are enough, although keys and values leave it too."""
    program = cleaned(name)
    floats = activations(program.module)
    values: dict[fx.Node, object] = {}
    observe(program, list(program.graph.nodes)[:-1], [batch(name)], lambda n, v, _: values.__setitem__(n, v))
    for part in blocks(program.module):
        known = {n: v for n, v in values.items() if n not in floats} | {part.source: values[part.source]}
        for node in part.nodes:
            if node not in known:
                args, kwargs = (fx.node.map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
                known[node] = node.target(*args, **kwargs)
        assert torch.equal(known[part.output], values[part.output])


@every
def test_nothing_but_the_cut_value_is_computed_with_behind_a_cut(name: str) -> None:
    program = cleaned(name)
    nodes, floats = list(program.graph.nodes)[:-1], activations(program.module)
    position = {n: i for i, n in enumerate(nodes)}
    cuts = cut_points(program.module)
    assert len(cuts) > LAYERS
    for node in nodes:
        for source in floats & set(node.all_input_nodes):
            assert not [c for c in cuts if position[source] < position[c] < position[node]], (source, node)


@every
def test_residual_sums_and_groups(name: str) -> None:
    graph = cleaned(name).graph
    sums = residual_sums(graph)
    assert len(sums) == LAYERS * (1 if name in PARALLEL else 2)
    assert {node.meta["type"].shape for node in sums} == {("batch", "sequence", 32)}
    inner = [len(group) for group in fusion_groups(graph)]
    if name == "opt-post-norm":
        inner = inner[1:-1]
    assert inner[:-1] == GROUPS.get(name, LLAMAS) * LAYERS


@every
def test_rotary_tables_and_masks_are_no_activations(name: str) -> None:
    floats = activations(cleaned(name).module)
    tables = [n for n in cleaned(name).graph.nodes if n.target in (aten.cos.default, aten.sin.default)]
    assert not floats & set(tables)
    assert all(n in floats for n in cleaned(name).graph.nodes if n.target in LINEAR)
    assert all("past_key" not in n.name for n in floats)


@every
def test_everything_can_be_quantized(name: str) -> None:
    """Scores, probabilities and context in every layer; the result stays near the model's."""
    context = Context(calibration=[batch(name), batch(name, rows=4, length=5)])
    program = cleaned(name)
    simulated = PassManager([Quantize(Scheme.parse("W8A8-full"))]).run(program, context)
    roles = Counter(row.role for row in context[PlacementReport].rows if row.spec)
    assert [roles[role] for role in ("scores", "probs", "context", "activation")] == [LAYERS] * 4
    assert roles["residual"] == len(residual_sums(program.graph))
    assert sum(is_scores(node) for node in simulated.graph.nodes) == LAYERS
    given = batch(name)
    keep = given["attention_mask"].bool()
    expected = program(**given)["logits"][keep]
    found = PassManager([Calibrate()]).run(simulated, context)(**given)["logits"][keep]
    error = float(((found - expected).norm() / expected.norm()).detach())
    assert 0 < error < 0.05


@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt"])
@pytest.mark.parametrize(("scheme", "role"), [("W8A8", "embedding-table"), ("W4A16-g16", ""), ("W8A8-e16", "")])
def test_a_tied_head_goes_with_its_table(name: str, scheme: str, role: str) -> None:
    """One quantizer that both read, or none, and then the head's input stays float too."""
    context = Context()
    program = PassManager([Quantize(Scheme.parse(scheme))]).run(cleaned(name), context)
    (embedding, *_) = program.graph.find_nodes(op="call_function", target=aten.embedding.default)
    head = linears(program.graph)[-1]
    assert LinearNode(head).weight is embedding.args[0]
    assert embedding.args[0].meta["quantizer"].role == role if role else embedding.args[0].op == "get_attr"
    assert ("quantizer" in head.args[0].meta) == bool(role)
    others = linears(program.graph)[:-1]
    assert all("quantizer" in LinearNode(node).weight.meta for node in others)


def test_gpt2_s_matrices_are_turned_and_noted() -> None:
    model, _ = traced("gpt2")
    program = cleaned("gpt2")
    state = model.state_dict()
    assert len(program.transposed) == 4 * LAYERS
    for name in program.transposed:
        target = name.removeprefix("model/")
        assert torch.equal(program.module.get_parameter(target), state[target].t())
    assert not any(cleaned(name).transposed for name in CONFIGURATIONS if name != "gpt2")
