"""A model with a prefix folded in, against transformers on the prefix followed by the sequence."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, LlamaConfig, OPTConfig

from bitlower.backends import onnx_qdq
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Level, Program
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.outliers.prefix_sinks import PrefixReport

PREFIX = (5, 7, 5)
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, bos_token_id=1,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@cache
def decoder(name: str) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model, load(model)


def prefixed(program: Program, pipeline: str = "") -> tuple[Program, Context]:
    context = Context([inputs(torch.randint(0, 96, (2, 9)))])
    tokens = " ".join(map(str, PREFIX))
    passes = parse_pipeline(f"clean,prefix-sinks{{tokens=[{tokens}]}}{pipeline}")
    return PassManager(passes).run(program, context), context


def inputs(ids: torch.Tensor, mask: torch.Tensor | None = None, past: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def with_prefix(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits behind the prefix, from transformers."""
    before = torch.tensor([PREFIX]).expand(len(ids), -1)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        whole = model(torch.cat([before, ids], 1), attention_mask=torch.cat([torch.ones_like(before), mask], 1))
    return whole.logits[:, len(PREFIX) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_model_on_the_prefix_and_the_sequence(name: str) -> None:
    model, program = decoder(name)
    result, context = prefixed(program)
    ids = torch.randint(0, 96, (3, 11))
    torch.testing.assert_close(result(**inputs(ids))["logits"], with_prefix(model, ids), rtol=0, atol=2e-6)
    report = context[PrefixReport]
    assert (report.tokens, report.attentions) == (PREFIX, 2)
    assert program.context_length is not None
    assert result.context_length == program.context_length - len(PREFIX)
    assert report.before > 0 < report.after


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_grows_behind_the_prefix(name: str) -> None:
    model, program = decoder(name)
    result, _ = prefixed(program)
    ids = torch.randint(0, 96, (2, 8))
    expected, past = with_prefix(model, ids), dict[str, torch.Tensor]()
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        outputs = result(**inputs(ids[:, start:stop], torch.ones(2, stop, dtype=torch.int64), start), **past)
        past = {k.replace("present", "past_key_values"): v for k, v in outputs.items() if k != "logits"}
        torch.testing.assert_close(outputs["logits"], expected[:, start:stop], rtol=0, atol=2e-6)
        assert all(value.shape[-2] == stop for value in past.values())


def test_padded_rows_do_not_see_their_padding() -> None:
    model, program = decoder("llama")
    result, _ = prefixed(program)
    ids, mask = torch.randint(0, 96, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    found, expected = result(**inputs(ids, mask))["logits"], with_prefix(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-6)


def test_without_tokens_the_first_is_that_of_the_configuration() -> None:
    _, program = decoder("llama")
    context = Context([inputs(torch.randint(0, 96, (1, 6)))])
    PassManager(parse_pipeline("clean,prefix-sinks")).run(program, context)
    assert context[PrefixReport].tokens == (1,)


def test_it_can_be_quantized_inside_attention_and_exported(tmp_path: Path) -> None:
    _, program = decoder("llama")
    full, context = prefixed(program, ",quantize{scheme=W8A8-full},calibrate,lower-integer")
    assert full.level is Level.INTEGER
    onnx_qdq.export(full, tmp_path, batches=context.calibration)
    assert (tmp_path / "model.onnx").is_file()


def test_refusals() -> None:
    _, program = decoder("llama")
    for pipeline, message in (
        ("clean,prefix-sinks{tokens=[96]}", "the vocabulary of 96 has no token 96"),
        ("clean,prefix-sinks{tokens=[-1]}", "takes int of 0 or more, not -1"),
    ):
        with pytest.raises(BitlowerError, match=message):
            PassManager(parse_pipeline(pipeline)).run(program, Context())
    nameless = program.clone()
    nameless.config = {k: v for k, v in program.config.items() if not k.endswith("_token_id")}
    with pytest.raises(BitlowerError, match="names no token"):
        PassManager(parse_pipeline("clean,prefix-sinks")).run(nameless, Context())


def test_an_encoder_is_refused(bert) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match="KV cache"):
        PassManager(parse_pipeline("clean,prefix-sinks{tokens=[1]}")).run(program, Context())


def test_a_state_that_has_not_read_the_prefix_is_refused() -> None:
    config = Lfm2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, layer_types=["conv", "full_attention"], bos_token_id=1,
    )  # fmt: skip
    program = load(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(BitlowerError, match=r"the model's past_key_values.0.conv would not have read the prefix"):
        PassManager(parse_pipeline("clean,prefix-sinks")).run(program, Context())
