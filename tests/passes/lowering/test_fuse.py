"""Whole models: a fused program gives the numbers of the integer one bit for bit, in few kernels, with nothing left."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from torch import fx

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Level, Program, Scheme, get_tensor, kernels, ops
from bitlower.ir.document import encode
from bitlower.ir.serialize import decode
from bitlower.ir.verifier import verify
from bitlower.passes import Context, Contract, PassManager, check_levels, parse_pipeline
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.fuse import Fuse, FuseReport
from bitlower.passes.lowering.legalize import Legalize
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
MODELS = {
    "llama": ("Llama", SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}),
    "gemma": ("Gemma", SIZES | {"num_key_value_heads": 1, "intermediate_size": 64, "head_dim": 8}),
    "neox": ("GPTNeoX", SIZES | {"intermediate_size": 64}),
    "phi": ("Phi", SIZES | {"intermediate_size": 64}),
    "opt": ("OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}),
}
LAUNCHES = {
    ("bert", "W8A8"): 7, ("bert", "W8A8-full"): 7, ("bert", "W8A8-peg4"): 7, ("bert", "W8A8-token"): 9,
    ("bert", "W4A16-g16"): 7, ("bert", "W12A12-full"): 7, ("bert", "W4A8-g16-upeg3"): 7,
    ("llama", "W8A8"): 11, ("llama", "W8A8-full"): 11, ("llama", "W8A8-token"): 12, ("llama", "W4A16-g16"): 10,
    ("gemma", "W8A8"): 11, ("gpt2", "W8A8"): 9, ("gpt2", "W8A8-full"): 9, ("gpt2", "W4A16-g16"): 9,
    ("opt", "W8A8"): 7, ("opt", "W8A8-token"): 9, ("opt", "W4A16-g16"): 7,
    ("neox", "W8A8-full"): 0, ("phi", "W8A8-full"): 0, ("phi", "W8A8"): 0,
}  # fmt: skip
"""Launches of the second block; of Llama, Gemma and OPT without what grows the cache and scales queries; 0: not looked
at."""
BESIDE = (torch.ops.aten.mul.Tensor, torch.ops.aten.cat.default)


@cache
def decoder(name: str) -> Program:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=64, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key or "ln_" in key:
                parameter += 0.1 * torch.randn(parameter.shape)
    return load(model, task="text-generation")


def tokens(program: Program, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The first row is padded, on the left for decoders."""
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    found = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found["token_type_ids"] = torch.zeros_like(ids)
    return {spec.name: found[spec.name] for spec in program.inputs if spec.name in found}


@pytest.fixture(scope="module")
def lowered(bert, run):
    """``lowered("bert", "W8A8")``: the program at level integer; more passes come before the last."""

    @cache
    def make(model: str, scheme: str, *more) -> Program:
        program = bert(labels=0)[1] if model == "bert" else decoder(model)
        passes = (Clean(), Quantize(Scheme.parse(scheme)), Calibrate(weights="minmax"), *more, LowerInteger())
        data = [tokens(program, 3, 9, seed) for seed in (1, 2)]
        return run(program, *passes, context=Context(calibration=data))

    return make


def fuse(program: Program, run) -> tuple[Program, FuseReport]:
    context = Context()
    return run(program, Fuse(), context=context), context[FuseReport]


def assert_equal(first: Program, second: Program, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        expected, found = first(**batch), second(**batch)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    return expected


@pytest.mark.parametrize(("model", "scheme"), LAUNCHES)
def test_the_numbers_stay_and_nothing_is_left_inside_blocks(lowered, run, model: str, scheme: str) -> None:
    integer = lowered(model, scheme)
    fused, report = fuse(integer, run)
    verify(fused)
    assert fused.level is Level.FUSED
    for rows, length in ((2, 7), (1, 1), (4, 12)):
        assert_equal(integer, fused, tokens(integer, rows, length, seed=5))
    assert len(report.blocks) == 2
    assert [row.remaining for row in report.blocks] == [0, 0]
    outside = [row.tensor for row in report.remaining]
    assert not outside or set(outside) == {"select"}  # the first token goes from the last norm into BERT's pooler
    if LAUNCHES[model, scheme]:
        block = report.blocks[1]
        assert block.after - beside(fused) == LAUNCHES[model, scheme]
        assert block.before > 2 * LAUNCHES[model, scheme] - 2


def beside(program: Program) -> int:
    """How many operators of the last layer scale queries or grow the cache."""
    inside = [node for node in program.graph.nodes if ".1.self_attn" in node.meta.get("path", "") and is_float(node)]
    return sum(node.target in BESIDE for node in inside)


def is_float(node: fx.Node) -> bool:
    return "type" in node.meta and node.meta["type"].is_float


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16-g16"])
def test_a_cache_goes_through(lowered, run, model: str, scheme: str) -> None:
    integer = lowered(model, scheme)
    fused, _ = fuse(integer, run)
    batch = tokens(integer, 2, 5)
    given = assert_equal(integer, fused, batch)
    past = {name.replace("present", "past_key_values"): value for name, value in given.items() if "present" in name}
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    places = mask.sum(1, keepdim=True) - 1
    step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": mask, "position_ids": places}
    step = {spec.name: step[spec.name] for spec in integer.inputs if spec.name in step}
    assert_equal(integer, fused, step | past)


@pytest.mark.parametrize("scheme", ["W8A8-peg4", "W8A8-upeg3", "W8A8-peg4-full"])
def test_what_legalize_cut_is_one_kernel_again(lowered, run, scheme: str) -> None:
    integer = lowered("bert", scheme, Legalize())
    fused, report = fuse(integer, run)
    verify(fused)
    assert_equal(integer, fused, tokens(integer, 3, 9, seed=5))
    assert [(row.after, row.remaining) for row in report.blocks] == [(7, 0), (7, 0)]
    assert all(row.before > 60 for row in report.blocks)
    assert any("columns" in node.kwargs for node in fused.graph.nodes)


def test_a_layer_of_bert_is_seven_kernels(lowered, run) -> None:
    """What each of them takes in, gives, and where."""
    _, report = fuse(lowered("bert", "W8A8"), run)
    layer = [row for row in report.kernels if row.block == 0]
    place = "encoder.layer.0."
    assert [(row.kernel, row.path.removeprefix(place), row.outputs) for row in layer] == [
        ("fused_linear", "attention.self.query", "value"),
        ("fused_attention", "attention.self", "codes"),
        ("fused_linear", "attention.output.dense", "value"),
        ("fused_norm", "attention.output.LayerNorm", "value codes"),
        ("fused_linear", "intermediate.dense", "codes"),
        ("fused_linear", "output.dense", "value"),
        ("fused_norm", "output.LayerNorm", "value codes"),
    ]
    assert Counter(layer[0].operators)["aten.linear.default"] == 3
    assert "aten.gelu.default" in layer[4].operators
    assert "aten.add.Tensor" in layer[2].operators
    assert report.summary().endswith(
        "launches a block 27 → 7; quantize and dequantize left inside blocks: 0, outside: 1"
    )


def test_reports_say_what_remains_and_why(lowered, run) -> None:
    _, report = fuse(lowered("bert", "W8A8-token-full"), run)
    reasons = {row.tensor: row.reason for row in report.remaining if row.operator == "quantize" and row.block == 1}
    dense = next(row for row in report.remaining if row.path == "encoder.layer.1.attention.output.dense")
    assert "every token gets a scale of its own" in dense.reason
    assert dense.reason.startswith("given by bitlower.fused_linear")
    assert any("aten.matmul" in reason and "which is no kernel" in reason for reason in reasons.values())
    assert {row.operator for row in report.remaining} == {"quantize", "dequantize", "choose_qparams"}
    assert any(miss.rule == "attention" for miss in report.misses)
    _, report = fuse(lowered("bert", "W8A8"), run)
    [row] = report.remaining
    assert (row.operator, row.tensor, row.block) == ("quantize", "select", -1)
    assert row.reason == "given by aten.select.int (%select), which is no kernel"


def test_merged_weights_are_the_weights_one_below_the_other(lowered, run) -> None:
    integer = lowered("llama", "W4A8-g16")
    fused, _ = fuse(integer, run)
    stem = "model.layers.0.self_attn"
    merged = get_tensor(fused.module, f"{stem}.q_proj_k_proj_v_proj.weight_codes")
    parts = [get_tensor(integer.module, f"{stem}.{name}_proj.weight_codes") for name in "qkv"]
    assert np.array_equal(merged, np.concatenate(parts))
    names = {name for name, _ in fused.tensors()}
    assert not any(name.endswith("q_proj.weight_codes") for name in names)
    assert fused.size_bytes() == integer.size_bytes()


def test_a_tied_head_keeps_the_codes_of_the_table(lowered, run) -> None:
    fused, report = fuse(lowered("llama", "W8A8"), run)
    readers = [node for node in fused.graph.nodes if kernels.is_kernel(node) and reads_table(node)]
    assert [node.target for node in readers] == [kernels.fused_embedding, kernels.fused_linear]
    assert sum(name.endswith("embed_tokens.weight_codes") for name, _ in fused.tensors()) == 1
    assert any(row.path == "lm_head" for row in report.kernels)


def reads_table(kernel: fx.Node) -> bool:
    return any(node.target == "model.embed_tokens.weight_codes" for node in kernel.all_input_nodes)


@pytest.mark.parametrize(("model", "scheme"), [("bert", "W8A8-full"), ("llama", "W8A8"), ("opt", "W8A8-token")])
def test_a_fused_program_can_be_saved_printed_and_cloned(lowered, run, model: str, scheme: str) -> None:
    fused, _ = fuse(lowered(model, scheme), run)
    again = decode(*encode(fused))
    verify(again)
    assert str(again) == str(fused) == str(fused.clone())
    assert again.digest() == fused.digest()
    assert_equal(fused, again, tokens(fused, 2, 6))
    assert [q for _, q in again.quantizers()] == [q for _, q in fused.quantizers()]
    line = next(line for line in str(fused).splitlines() if "bitlower.fused_linear" in line)
    assert re.search(r"x: [a-z-]+ u8 asymmetric", line)
    assert "weight s8 per-channel(0)" in line


def test_every_quantizer_is_still_known(lowered, run) -> None:
    """Merged ones by the name of the merged weight; each tensor once."""
    integer = lowered("bert", "W8A8-full")
    fused, _ = fuse(integer, run)
    before = {q.tensor for _, q in integer.quantizers()}
    after = [q.tensor for _, q in fused.quantizers()]
    assert len(after) == len(set(after))
    gone = {tensor for tensor in before - set(after) if not any(name in tensor for name in ("query", "key", "value"))}
    assert all(tensor.startswith("linear") for tensor in gone)  # results of query, key and value
    assert sum("query_key_value" in tensor for tensor in after) == 2


def test_levels_contract_and_results(bert, run) -> None:
    assert Fuse.contract is Contract.EXACT
    pipeline = parse_pipeline("clean,quantize,calibrate,lower-integer,fuse")
    assert check_levels(pipeline, Level.FLOAT) is Level.FUSED
    with pytest.raises(BitlowerError, match="'fuse', takes a program at level integer; here it is simulated"):
        check_levels([Quantize(), Calibrate(), Fuse()], Level.FLOAT)
    _, program = bert(labels=0)
    data = [tokens(program, 3, 9, seed) for seed in (1, 2)]
    result = PassManager(pipeline).run(program, Context(calibration=data, evaluation=data))
    assert result.level is Level.FUSED
    assert not result.graph.find_nodes(op="call_function", target=ops.dequantize)


def test_backends_of_integer_programs_refuse_fused_ones() -> None:
    OnnxQdq().check_level(Level.INTEGER)
    OnnxQdq().check_level(Level.FLOAT)
    with pytest.raises(BitlowerError, match="kernels that this backend does not know; leave out the pass `fuse`"):
        OnnxQdq().check_level(Level.FUSED)
    with pytest.raises(BitlowerError, match="run the pass `lower-integer` first"):
        OnnxQdq().check_level(Level.SIMULATED)
