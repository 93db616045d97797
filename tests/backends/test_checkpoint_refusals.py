"""What a format cannot hold is refused before anything is written, and the layer is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from bitlower.backends.checkpoint import Checkpoint, export
from bitlower.frontends import load
from bitlower.ir import (
    BitlowerError,
    CheckError,
    Granularity,
    Grid,
    Level,
    Program,
    QuantSpec,
    get_tensor,
    set_tensor,
)
from bitlower.passes import Context, PassManager, parse_pipeline

Lowered = Callable[..., Program]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Checkpoint(format="gptq"), "format is gptq; it takes one of compressed-tensors, gptq-v2"),  # type: ignore[arg-type]
        (lambda: Checkpoint(dtype="float64"), "dtype is float64; it takes one of float16"),  # type: ignore[arg-type]
        (lambda: Checkpoint(max_shard_size=0), "max-shard-size is 0; it takes int of 1 or more"),
        (lambda: Checkpoint(max_shard_size=True), "max-shard-size is True"),
    ],
)
def test_options_out_of_range_are_named(make: Callable[[], Checkpoint], message: str):
    with pytest.raises(BitlowerError, match=message):
        make()


CASES = [
    ("gpt2", "W4A16-g32", "compressed-tensors", r"cannot hold transformer\.h\.0\.attn\.c_attn: .* Conv1D; .* gptq-v2"),
    ("llama", "W5A16", "gptq-v2", r"cannot hold model\.layers\.0\.self_attn\.q_proj: .* 2, 3, 4 and 8 bits, not of 5"),
    ("llama", "W4A16-g8", "gptq-v2", r"q_proj: its clients know groups of 16, .*, not of 8"),
    ("llama", "W8A8", "compressed-tensors", r"\(linear-input of .*\) is quantized when the model runs"),
    ("llama", "W8A8-token-e16", "gptq-v2", r"\(linear-input of .*\) is quantized when the model runs"),
]


@pytest.mark.parametrize(("kind", "scheme", "form", "message"), CASES)
def test_what_a_format_cannot_hold_is_named(lowered: Lowered, prompts, tmp_path: Path, kind, scheme, form, message):
    passes = f"quantize{{scheme={scheme}}},calibrate{{weights=minmax activations=minmax}},lower-integer"
    program = PassManager(parse_pipeline(passes)).run(lowered(kind), Context(prompts))
    with pytest.raises(BitlowerError, match=message):
        export(program, tmp_path, batches=prompts, format=form)
    assert not list(tmp_path.iterdir())


def test_a_simulated_program_is_refused(lowered: Lowered, prompts, tmp_path: Path):
    program = PassManager(parse_pipeline("quantize{scheme=W8A16}")).run(lowered("llama"), Context())
    assert program.level is Level.SIMULATED
    with pytest.raises(BitlowerError, match="lower-integer"):
        export(program, tmp_path, batches=prompts)


def test_a_program_of_no_known_model_is_refused(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama")
    program.config = {}
    with pytest.raises(BitlowerError, match=r"of no model of theirs; .* `onnx-qdq`"):
        export(program, tmp_path, batches=prompts)
    program = lowered("llama")
    program.task = "translation"
    with pytest.raises(BitlowerError, match="no Hugging Face model for the task 'translation'"):
        export(program, tmp_path, batches=prompts)


def test_a_number_that_half_precision_cannot_hold_is_named(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    name = "model.norm.weight"
    set_tensor(program.module, name, torch.nn.Parameter(get_tensor(program.module, name).detach() + 1e5))
    with pytest.raises(BitlowerError, match=r"model\.norm\.weight reaches 1e\+05, which float16 cannot hold"):
        export(program, tmp_path, batches=prompts)
    assert not list(tmp_path.iterdir())


def test_an_own_parameter_has_no_place(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    norm = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == "model.norm.weight")
    set_tensor(program.module, "extra", torch.nn.Parameter(get_tensor(program.module, "model.norm.weight").detach()))
    norm.target = "extra"
    program.recompile()
    with pytest.raises(BitlowerError, match="extra is no weight of LlamaForCausalLM"):
        export(program, tmp_path, batches=prompts)


def test_a_missing_weight_is_named(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    norms = [n for n in program.graph.nodes if n.op == "get_attr" and str(n.target).endswith("norm.weight")]
    norms[-1].target = norms[0].target
    program.recompile()
    with pytest.raises(BitlowerError, match=r"no weight model\.norm\.weight, which LlamaForCausalLM needs"):
        export(program, tmp_path, batches=prompts)


def test_a_graph_that_no_checkpoint_can_hold_is_found(lowered: Lowered, prompts, tmp_path: Path):
    """Hugging Face's model would compute without what a pass put into the graph."""
    program = lowered("llama", "W4A16-g32")
    logits = program.graph.output_node().args[0][0]
    with program.graph.inserting_after(logits):
        scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (logits, 1.01))
    scaled.meta = dict(logits.meta)
    logits.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    program.recompile()
    with pytest.raises(CheckError, match=r"standard deviations off the program's.*a pass changed the graph"):
        export(program, tmp_path, batches=prompts)


def test_gptq_packs_blocks_and_the_head_only(lowered: Lowered, prompts, tmp_path: Path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=8
    )  # fmt: skip
    passes = parse_pipeline("clean,quantize{scheme=W4A16-g32},calibrate{weights=minmax},lower-integer")
    program = PassManager(passes).run(load(BertForSequenceClassification(config).eval()), Context())
    with pytest.raises(BitlowerError, match=r"cannot hold bert\.pooler\.dense: .* its head only"):
        export(program, tmp_path, batches=prompts, format="gptq-v2")
    assert not list(tmp_path.iterdir())


def test_a_batch_is_needed(lowered: Lowered, tmp_path: Path):
    with pytest.raises(BitlowerError, match="without a batch"):
        export(lowered("llama", "W4A16-g32"), tmp_path, batches=[])


GROUPS = QuantSpec(Grid(4), Granularity.per_group(32))
ROWS3 = QuantSpec(Grid(3), Granularity.per_channel(0))


@pytest.mark.parametrize(
    ("spec", "shape", "role", "options", "reason"),
    [
        (GROUPS, (64, 96), "linear-weight", {}, ""),
        (GROUPS, (64, 96), "linear-weight", {"format": "gptq-v2"}, ""),
        (GROUPS, (64, 100), "linear-weight", {}, "per-group(32) and an axis of 100 have only blocks of 4 in common"),
        (GROUPS, (60, 96), "linear-weight", {"format": "gptq-v2"}, "60 outputs of 4 bits do not fill 32-bit words"),
        (GROUPS, (60, 96), "linear-weight", {}, ""),
        (GROUPS, (96, 64), "embedding-table", {"format": "gptq-v2"}, ""),
        (GROUPS, (96, 64), "linear-input", {}, "nothing else"),
        (
            QuantSpec(Grid(3), Granularity.per_channel(0)),
            (40, 96),
            "linear-weight",
            {"format": "gptq-v2"},
            "of 32 does",
        ),
        (ROWS3, (40, 96), "linear-weight", {}, ""),
        (QuantSpec(Grid(4), Granularity.per_channel(1)), (64, 96), "linear-weight", {}, "not per-channel(1)"),
        (QuantSpec(Grid(4), Granularity.per_group(32, 0)), (64, 96), "linear-weight", {}, "not per-group(32, axis=0)"),
        (QuantSpec(Grid(16), Granularity.per_channel(0)), (64, 96), "linear-weight", {}, "of up to 8 bits, not of 16"),
    ],
)
def test_support_is_known_beforehand(spec, shape, role, options, reason: str):
    answer = Checkpoint(**options).supports(spec, shape, role)
    assert reason in answer
    assert bool(answer) is bool(reason)


def test_a_weight_that_is_read_past_its_layer_is_refused_and_may_stay_float(tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=32, vocab_size=64)
    model = load(AutoModelForCausalLM.from_config(config).eval(), task="text-generation")
    program = PassManager(parse_pipeline("clean,quantize{scheme=W4A16-g32}")).run(model, Context())
    with pytest.raises(
        BitlowerError, match=r"mixer\.dt_proj is multiplied with by backbone\.layers\.0\.mixer, "
    ) as refusal:
        Checkpoint().check_fits(program)
    (ignore,) = re.findall(r"ignore=\[[^ ]*\]", str(refusal.value.hint))
    program = PassManager(parse_pipeline(f"clean,quantize{{scheme=W4A16-g32 {ignore}}}")).run(model, Context())
    Checkpoint().check_fits(program)  # out_proj is unfolded as it is loaded
    lowered = PassManager(parse_pipeline(f"clean,quantize{{scheme=W4A16-g32 {ignore}}},rtn,lower-integer")).run(
        model, Context()
    )
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    Checkpoint().export(lowered, tmp_path, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    with pytest.raises(
        BitlowerError, match=r"mixer\.out_proj is initialized by MambaMixer when transformers"
    ) as refusal:
        Checkpoint(format="gptq-v2").check_fits(program)
    (other,) = re.findall(r"ignore=\[([^ ]*)\]", str(refusal.value.hint))
    both = f"{ignore[:-1]} {other}]"
    program = PassManager(parse_pipeline(f"clean,quantize{{scheme=W4A16-g32 {both}}}")).run(model, Context())
    Checkpoint(format="gptq-v2").check_fits(program)
    layers = {quantizer.tensor.split(".")[-2] for _, quantizer in program.quantizers()}
    assert layers == {"in_proj", "x_proj"}
