"""Training of encoder-decoders: losses count the target's tokens, and everything that trains takes both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional

from bitlower.ir import Batch, Program, get_tensor
from bitlower.ir.observe import observe, run
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._forward import hidden_nodes
from bitlower.passes.training._part import parts
from bitlower.passes.training._report import TrainReport


def trained(seq2seq: Any, kind: str, pipeline: str) -> tuple[Program, Context]:
    data = seq2seq.batches(kind, 4)
    context = Context(data, data[:1], training=data[:3], held_out=data[3:])
    return PassManager(parse_pipeline(pipeline)).run(seq2seq.traced(kind), context), context


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_the_tasks_loss_is_that_of_the_targets_next_tokens(kind: str, seq2seq: Any) -> None:
    """Against transformers' logits on the held-out batch, without the padding of the target; tables are in 8 bits."""
    pipeline = "clean,quantize{scheme=W16A16-e8},calibrate,qat{losses=[task] steps=1 evaluate-every=1}"
    _, context = trained(seq2seq, kind, pipeline)
    (batch,) = context.held_out
    read = {name: value for name, value in batch.items() if name != "decoder_attention_mask"}
    with torch.no_grad():
        logits = seq2seq.model_of(kind)(**read).logits
    labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, -100)[:, 1:]
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert context[TrainReport].curve[0].held_out == pytest.approx(float(expected), rel=5e-3)


LEARNERS = {
    "quantgpt": ("clean,quantize{scheme=W2A8},calibrate", "qat{preset=quantgpt steps=2 evaluate-every=1 keep=last}"),
    "autoround": ("clean,quantize{scheme=W3A16-g16},rtn", "autoround{iterations=4 batch=2}"),
}


@pytest.mark.parametrize(
    ("kind", "learner"),
    [
        ("bart", "quantgpt"),
        ("t5", "quantgpt"),
        ("t5", "autoround"),
        ("whisper", "autoround"),
        pytest.param("whisper", "quantgpt", marks=pytest.mark.nightly),
        pytest.param("bart", "autoround", marks=pytest.mark.nightly),
    ],
)
def test_both_sides_learn(kind: str, learner: str, seq2seq: Any) -> None:
    start, learn = LEARNERS[learner]
    before, after = (dict(trained(seq2seq, kind, text)[0].tensors()) for text in (start, f"{start},{learn}"))
    changed = [name for name, tensor in after.items() if name in before and not torch.equal(before[name], tensor)]
    for side in ("encoder.", "decoder."):
        assert any(name.removeprefix("model/").removeprefix("model.").startswith(side) for name in changed), side


def values_of(program: Program, nodes: list[fx.Node], batch: Batch) -> list[torch.Tensor]:
    values: dict[fx.Node, torch.Tensor] = {}
    observe(program, nodes, [batch], lambda node, value, _: values.update({node: value}))
    return [values[node] for node in nodes]


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_the_walk_gives_each_block_what_both_programs_compute(kind: str, seq2seq: Any) -> None:
    """Inputs, context and targets of every block; and the block gives what the program does."""
    program, _ = trained(seq2seq, kind, "clean,quantize{scheme=W4A8},calibrate")
    reference, _ = trained(seq2seq, kind, "clean")
    batches, both = seq2seq.batches(kind, 2), pairs(program, reference, "lkd")
    assert len(both) == (4 if kind == "t5" else 3)
    for inputs, memory in (("quantized", 1 << 30), ("float", 0)):
        for step in Walk(both, batches, inputs=inputs, memory=memory):
            mine, theirs = both[step.index]
            side, part = (program, mine) if inputs == "quantized" else (reference, theirs)
            for index, batch in enumerate(batches):
                expected = values_of(side, [part.source, *part.context], batch)
                actual = [step.inputs[index], *(values[index] for values in step.context)]
                torch.testing.assert_close(actual, expected)
                torch.testing.assert_close(step.targets[index], *values_of(reference, [theirs.output], batch))
                if inputs == "quantized":
                    with torch.no_grad():
                        outputs = mine.module()(*step.arguments(batch, index))
                    torch.testing.assert_close(outputs, tuple(values_of(program, [mine.output], batch)))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_what_reads_the_encoder_belongs_to_the_decoders_block(kind: str, seq2seq: Any) -> None:
    """Keys and values of cross-attention, with their weights: each in one block."""
    program = seq2seq.traced(kind)
    held = [str(node.target) for part in parts(program) for node in part.nodes if node.op == "get_attr"]
    words = ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight", "EncDecAttention.k.", "EncDecAttention.v.")
    names = [name.removeprefix("model/") for name, _ in program.tensors() if any(word in name for word in words)]
    assert len(names) == 4
    assert all(held.count(name) == 1 for name in names)


def test_keys_and_values_of_cross_attention_learn(seq2seq: Any) -> None:
    start = "clean,quantize{scheme=W3A16-g16},rtn"
    before, after = (
        dict(trained(seq2seq, "bart", text)[0].tensors()) for text in (start, f"{start},lkd{{iterations=8 batch=2}}")
    )
    names = [name for name in before if name.endswith(("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight"))]
    assert any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("data", ["calibration", "random"])
def test_layer_wise_distillation_takes_both_sides(data: str, seq2seq: Any) -> None:
    program, context = trained(
        seq2seq, "bart", f"clean,quantize{{scheme=W3A16-g16}},rtn,lkd{{iterations=4 batch=2 data={data}}}"
    )
    assert bool(torch.isfinite(run(program, context.calibration[0])["logits"]).all())


def test_full_placement_of_relative_attention_learns(seq2seq: Any) -> None:
    """T5's bias of positions holds the mask, whose values no grid should cover."""
    program, context = trained(
        seq2seq, "t5", "clean,quantize{scheme=W8A8-full},calibrate,qat{steps=2 evaluate-every=1}"
    )
    roles = [quantizer.role for _, quantizer in program.quantizers()]
    assert roles.count("logits") == 1
    scales = [get_tensor(program.module, QuantizerNode(node).stored[0]).max() for node, _ in program.quantizers()]
    assert max(map(float, scales)) < 1
    assert context[TrainReport].steps == 2


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_hidden_states_are_those_of_the_decoder(kind: str, seq2seq: Any) -> None:
    """As transformers returns them: the last of the decoder, behind its norm (T5 scales it for a tied head)."""
    program, model = seq2seq.traced(kind), seq2seq.model_of(kind)
    (batch,) = seq2seq.batches(kind, 1, padded=False)
    (node,) = hidden_nodes(program)
    values: dict[str, torch.Tensor] = {}
    observe(program, [node], [batch], lambda node, value, _: values.update({"hidden": value}))
    read = {name: value for name, value in batch.items() if name != "decoder_attention_mask"}
    with torch.no_grad():
        expected = model(**read, output_hidden_states=True).decoder_hidden_states[-1]
    factor = model.config.d_model**-0.5 if kind == "t5" and model.config.tie_word_embeddings else 1.0
    assert torch.allclose(values["hidden"], factor * expected, atol=1e-4)


@pytest.mark.parametrize("losses", ["[hidden]", "[attention]", "[logits token-contrast]"])
def test_losses_of_the_target_take_padded_batches(losses: str, seq2seq: Any) -> None:
    program, context = trained(
        seq2seq, "bart", f"clean,quantize{{scheme=W4A8}},calibrate,qat{{losses={losses} steps=2 evaluate-every=1}}"
    )
    assert context[TrainReport].steps == 2
    assert bool(torch.isfinite(run(program, context.calibration[0])["logits"]).all())
