"""Plans against what really comes out: tensors by hand, artifacts that are exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitlower.backends.registry import make_backend
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.passes import parse_pipeline
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import make_plan, plan_recipe
from bitlower.tools.runs.flow import quantize, standard_passes, standard_recipe
from bitlower.tools.runs.standard import standard_exports


def test_tensors_by_hand(bert_program: Program) -> None:
    plan = make_plan(bert_program.clone(), standard_passes("W8A8", ["pooler"]), Load(8, 16))
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    weight = tensors["encoder.layer.0.intermediate.dense.weight"]
    assert (weight.shape, weight.bits, weight.float_bytes) == ((64, 32), 8, 64 * 32 * 4)
    assert weight.bytes == 64 * 32 + 64 * 4  # codes, and a scale for each of 64 channels
    ignored = tensors["pooler.dense.weight"]
    assert (ignored.bits, ignored.bytes, ignored.reason) == (32, 32 * 32 * 4, "ignored by a pattern")
    assert tensors["encoder.layer.1.output.LayerNorm.bias"].bits == 32
    assert sum(t.float_bytes for t in plan.tensors) == plan.float_bytes
    inputs = [value for value in plan.activations if value.role == "linear-input"]
    assert all(value.spec == "u8 asymmetric per-tensor" for value in inputs if not value.reason)
    assert {value.reason for value in plan.activations if value.role == "residual"} == {
        "the scheme leaves residual in float"
    }


def test_a_shared_tensor_counts_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(64, 64, bias=False)
            self.second = torch.nn.Linear(64, 64, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    program = load(Tied().eval(), example_inputs={"x": torch.randn(3, 64)})
    plan = make_plan(program, standard_passes("W8A8"), Load(8, 16))
    assert sum(t.bytes for t in plan.tensors) == 64 * 64 + 64 * 4
    assert plan.float_bytes == 64 * 64 * 4


def test_a_plan_is_plain_data_and_says_what_it_cannot_foresee(bert: Path, texts: Path, traced: None) -> None:
    plan = plan_recipe(standard_recipe(str(bert), "W8A8-token", str(texts), samples=16))
    form = plan.to_dict()
    assert json.loads(json.dumps(form))["file_bytes"] == plan.file_bytes
    assert [note.partition(" ")[0] for note in plan.notes] == ["smooth"]
    assert plan.peak_bytes > plan.float_bytes
    assert plan.seconds > 0
    assert len(plan.tables()) == 3


def test_plans_find_the_mistakes_of_the_run(bert_program: Program) -> None:
    with pytest.raises(BitlowerError, match="no-such-layer"):
        make_plan(bert_program.clone(), standard_passes("W8A8", ["no-such-layer"]), Load(8, 16))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8-full"])
def test_the_predicted_size_is_that_of_the_artifact(tmp_path: Path, scheme: str) -> None:
    """A model large enough that the graph itself, which is estimated roughly, is not most of the file."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=64,
    )  # fmt: skip
    module = BertModel(config).eval()
    ids = torch.randint(0, 2000, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    made = quantize(module, scheme=scheme, calibration=[batch], output=tmp_path / "out")
    plan = make_plan(load(module), standard_passes(scheme), Load(1, 12))
    assert plan.file_bytes == pytest.approx(made.summary.files["model.onnx"], rel=0.02)
    assert plan.artifact_bytes == pytest.approx(made.summary.artifact_bytes, rel=0.03)
    beside = made.summary.artifact_bytes - made.summary.files["model.onnx"]
    assert plan.artifact_bytes - plan.file_bytes == pytest.approx(beside, rel=0.3)


def test_two_files_of_an_encoder_decoder_may_both_hold_its_table(tmp_path: Path, seq2seq: Any) -> None:
    config = transformers.BartConfig(**{**seq2seq.CONFIGS["bart"]().to_dict(), "vocab_size": 6000, "decoder_layers": 1})
    program = load(transformers.AutoModelForSeq2SeqLM.from_config(config).eval())
    foreseen, written = [], []
    for layout in ("genai", "optimum"):
        backend, folder = make_backend("onnx-qdq", {"layout": layout}), tmp_path / layout
        foreseen.append(make_plan(program, (), Load(1, 8), [backend]).file_bytes)
        folder.mkdir()
        backend.export(program, folder, seq2seq.batches("bart", 1))
        written.append(sum(path.stat().st_size for path in folder.glob("*.onnx*")))
    table = 6000 * 16 * 4
    assert written[1] - written[0] == pytest.approx(table, rel=0.05)
    assert foreseen[1] - foreseen[0] == pytest.approx(table, rel=0.05)
    assert foreseen[1] == pytest.approx(written[1], rel=0.1)


def test_a_decoder_in_few_bits_by_hand(llama_program: Program) -> None:
    passes, exports = standard_passes("W4A16-g16"), standard_exports("W4A16-g16")
    plan = make_plan(llama_program.clone(), passes, Load(8, 32), exports)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert (down.shape, down.bits, down.bytes) == ((32, 64), 4, 32 * 64 // 2 + 32 * 4 * 4)
    assert down.bits_per_weight == 4 + 32 / 16
    for table in ("lm_head.weight", "model.embed_tokens.weight"):
        assert (tensors[table].bits, tensors[table].reason) == (32, "an output head of 1,184 weights is small")
    assert plan.target == "onnx-qdq{form=onnxruntime}"
    assert plan.notes == ()
    more = make_plan(llama_program.clone(), passes, Load(8, 32), [*exports, make_backend("checkpoint")])
    assert [note.partition(" is ")[0] for note in more.notes] == ["checkpoint"]
    packed = make_plan(llama_program.clone(), passes, Load(8, 32), [make_backend("checkpoint")])
    assert packed.float_bytes > 2 * packed.file_bytes
    rounded = make_plan(llama_program.clone(), standard_passes("W4A16-g16", algorithm="rtn"), Load(8, 32), exports)
    assert rounded.seconds <= plan.seconds
    assert rounded.peak_bytes < plan.peak_bytes
    learned = make_plan(llama_program.clone(), standard_passes("W4A16-g16", algorithm="adaround"), Load(8, 32), exports)
    assert learned.file_bytes == plan.file_bytes
    assert learned.notes == ()
    assert learned.seconds > rounded.seconds
    assert learned.peak_bytes > rounded.peak_bytes + 4 * sum(math.prod(t.shape) for t in learned.tensors if t.spec)


@pytest.mark.parametrize(
    ("scheme", "export", "message"),
    [
        ("W4A16-g20", ("checkpoint", {}), r"self_attn.q_proj.weight .*per-group\(20\)"),
        ("W4A16-g8", ("checkpoint", {"format": "gptq-v2"}), r"cannot hold .*q_proj.weight .*groups"),
        ("W4A8-g16-e16", ("checkpoint", {}), r"checkpoint cannot hold .* \(linear-input\)"),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_the_target_cannot_hold(
    llama_program: Program, scheme: str, export: tuple[str, dict[str, str]], message: str
) -> None:
    with pytest.raises(BitlowerError, match=message):
        make_plan(llama_program.clone(), standard_passes(scheme, algorithm="rtn"), Load(8, 32), [make_backend(*export)])


def test_a_library_for_cuda_keeps_float_matrices_in_half_precision(llama_program: Program) -> None:
    passes = standard_passes("W4A16-g16", algorithm="rtn")
    cuda = {"target": "cuda", "unrun": True}
    sizes = []
    for options in ({"target": "llvm"}, cuda, cuda | {"activations": "float32"}):
        plan = make_plan(llama_program.clone(), passes, Load(8, 32), [make_backend("tvm-kernels", options)])
        sizes.append({tensor.name: tensor.bytes for tensor in plan.tensors})
    host, half, full = sizes
    table, norm, down = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    assert host[table] == full[table] == 2 * half[table]
    assert half[norm] == host[norm]
    assert half[down] == full[down]


def test_a_plan_says_where_memory_and_time_are_lower_bounds(llama_program: Program) -> None:
    """Each product by a quantized weight becomes four; that of the head, which stays float, is one."""
    text = "clean,quantize{scheme=W8A8-upeg4-e16},calibrate,legalize,lower-integer"
    plan = make_plan(llama_program.clone(), parse_pipeline(text), Load(8, 32))
    count = len([tensor for tensor in plan.tensors if tensor.spec])
    assert plan.at_least
    assert plan.notes[0].startswith(f"legalize: it makes up to {4 * count + 1} products of {count + 1}, each a node")
    assert "every rounded value of a decoder's windows" in plan.notes[1]
    assert any("at least" in str(cell) for cell in plan.tables()[2].columns[1].cells)
    weights = make_plan(llama_program.clone(), standard_passes("W4A16-g16"), Load(8, 32))
    assert not weights.at_least
    assert not make_plan(
        llama_program.clone(), parse_pipeline("clean,quantize{scheme=W8A8-token}"), Load(8, 32)
    ).at_least
