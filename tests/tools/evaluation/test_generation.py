"""Greedy generation against transformers' own, for three architectures, with left-padded batches."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OpenAIGPTConfig, OPTConfig

from bitlower.frontends import load
from bitlower.frontends.tokenize import token_ids
from bitlower.ir import BitlowerError, Program
from bitlower.tools.evaluation.generation import generate, sample

CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip
NEW = 10


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request: pytest.FixtureRequest) -> tuple[Any, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that the tokens differ
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return model, load(model)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 1 tokens, padded on the left with token 5."""
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :6] = 0, 0
    return ids.masked_fill(mask == 0, 5), mask


def reference(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 5, "eos_token_id": None} | options
    result: torch.Tensor = model.generate(ids, attention_mask=mask, **settings)
    return result


def test_generation_is_that_of_transformers(decoder: tuple[Any, Program]) -> None:
    model, program = decoder
    ids, mask = prompts()
    expected = reference(model, ids, mask)
    found = generate(program, ids, NEW, attention_mask=mask, stops=())
    assert torch.equal(found, expected)
    assert len(set(expected[:, 7:].flatten().tolist())) > 3
    alone = generate(program, ids[:1], NEW, stops=())
    assert torch.equal(alone, expected[:1])


def test_rows_end_at_a_stop_token_and_all_end_together(decoder: tuple[Any, Program]) -> None:
    model, program = decoder
    ids, mask = prompts()
    stop = int(reference(model, ids, mask)[0, 9])
    expected = reference(model, ids, mask, eos_token_id=stop)
    assert torch.equal(generate(program, ids, NEW, attention_mask=mask, stops=[stop], pad=5), expected)
    short = generate(program, ids[:1], NEW, stops=[stop])
    assert short.shape[1] <= 10
    assert int(short[0, -1]) == stop


def test_generation_ends_with_the_context(decoder: tuple[Any, Program]) -> None:
    model, program = decoder
    ids = torch.arange(3, 63)[None]
    found = generate(program, ids, 50, stops=(), pad=5)
    assert found.shape == (1, 65)  # the last token is given out, and never read
    assert torch.equal(found[:, :-1], reference(model, ids, torch.ones_like(ids), max_new_tokens=4))
    with pytest.raises(BitlowerError, match="a prompt of 65 tokens does not fit the model") as caught:
        generate(program, found, 1)
    assert "64 tokens" in caught.value.hint


def test_without_a_cache_all_tokens_are_run_again() -> None:
    torch.manual_seed(0)
    config = OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=24)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    found = generate(load(model), ids, NEW, stops=(), pad=5)
    assert torch.equal(found, reference(model, ids, torch.ones_like(ids)))
    assert len(found.unique()) > NEW // 2  # what it says differs from token to token


def test_a_sample_stops_and_is_timed(llama_program: Program) -> None:
    found = sample(llama_program, "the cat sings near a river", 12, stops=())
    ids = token_ids(llama_program, "the cat sings near a river")[None]
    expected = generate(llama_program, ids, 12, stops=())[0, 6:].tolist()
    words = found.text.split()
    assert (found.prompt_tokens, found.new_tokens) == (6, 12)
    assert words == [w for i in expected if (w := _word(llama_program, i))]
    assert found.prefill_tokens_per_second > 0
    assert (found.decode_tokens_per_second or 0) > 0
    first = sample(llama_program, "the cat sings near a river", 12, stops=[expected[0]])
    assert (first.new_tokens, first.decode_tokens_per_second) == (1, None)
    assert found.to_dict()["new_tokens"] == 12


def _word(program: Program, token: int) -> str:
    import json

    vocabulary = json.loads(program.assets["tokenizer.json"])["model"]["vocab"]
    return next(word for word, i in vocabulary.items() if i == token) if token > 2 else ""


def test_what_cannot_be_generated_is_refused(llama_program: Program, bert_program: Program) -> None:
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(BitlowerError, match="padded on the right"):
        generate(llama_program, ids, 2, attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(BitlowerError, match=r"\[1, 3\] and a mask of \[1, 2\] do not fit"):
        generate(llama_program, ids, 2, attention_mask=torch.ones(1, 2))
    with pytest.raises(BitlowerError, match="0 new tokens"):
        generate(llama_program, ids, 0)
    with pytest.raises(BitlowerError, match="no causal language model"):
        generate(bert_program, ids, 2)
