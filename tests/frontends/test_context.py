"""The longest context of a model, against transformers: it runs on so many tokens, and fails on one more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bitlower.frontends import load
from bitlower.frontends.tokenize import check_length, random_windows
from bitlower.ir import BitlowerError, Program, serialize

LONGEST = 40
OPT = {
    "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
    "word_embed_proj_dim": 16,
}  # fmt: skip
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "n_positions": LONGEST}
BERT = {**HEADS, "hidden_size": 16, "intermediate_size": 24}
LIMITED: dict[str, tuple[str, dict[str, Any], int]] = {
    "GPT2LMHead": ("GPT2", GPT, LONGEST),
    "GPTJForCausalLM": ("GPTJ", {**GPT, "rotary_dim": 4}, LONGEST),
    "CodeGenForCausalLM": ("CodeGen", {**GPT, "n_head": 4, "rotary_dim": 4}, LONGEST),
    "GPTBigCodeForCausalLM": ("GPTBigCode", GPT, LONGEST),
    "MptForCausalLM": (
        "Mpt",
        {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 60, "max_seq_len": LONGEST},
        LONGEST,
    ),
    "OPTForCausalLM": ("OPT", {**OPT, "max_position_embeddings": LONGEST}, LONGEST),
    "BertModel": ("Bert", {**BERT, "max_position_embeddings": LONGEST}, LONGEST),
    "RobertaModel": ("Roberta", {**BERT, "max_position_embeddings": LONGEST, "pad_token_id": 1}, LONGEST - 2),
}
UNLIMITED: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "BloomForCausalLM": ("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60}, None),
    "LlamaForCausalLM": ("Llama", {**BERT, "max_position_embeddings": LONGEST}, LONGEST),
}


def build(name: str, config: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    name = f"{name}Model" if name.endswith("Head") else name
    made: Any = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options))
    return made.eval()


def run(model: Any, length: int) -> torch.Tensor:
    ids = 3 + torch.arange(length)[None] % 50
    with torch.no_grad():
        first: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return first


LIKE_OTHERS = ("GPTBigCodeForCausalLM", "CodeGenForCausalLM")
"""Their positions are those of GPT-2 and of GPT-J."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] if name in LIKE_OTHERS else []) for name in LIMITED]
)
def test_the_context_is_what_transformers_takes_and_no_more(name: str) -> None:
    config, options, longest = LIMITED[name]
    model = build(name, config, options)
    program = load(model)
    assert program.context_length == longest
    expected = run(model, longest)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, longest + 1)
    [window] = random_windows(program, count=1, length=longest + 5)
    assert window["input_ids"].shape == (1, longest)
    window["input_ids"] = 3 + torch.arange(longest)[None] % 50
    torch.testing.assert_close(program(**window)[program.outputs[0].name], expected, rtol=0, atol=1e-5)
    with pytest.raises(BitlowerError, match=f"it takes 2 to {longest} tokens"):
        check_length(program, longest + 1)


@pytest.mark.parametrize("name", UNLIMITED)
def test_a_model_without_a_last_position_takes_what_its_configuration_says_or_anything(name: str) -> None:
    config, options, longest = UNLIMITED[name]
    model = build(name, config, options)
    program = load(model)
    assert program.context_length == longest
    assert run(model, 3 * LONGEST).shape[1] == 3 * LONGEST
    if longest is None:
        check_length(program, 3 * LONGEST)


def test_a_saved_program_keeps_its_context() -> None:
    program = load(build("GPT2LMHead", "GPT2", GPT))
    document, tensors = serialize.encode(program)
    assert serialize.decode(document, tensors).context_length == LONGEST
    assert program.clone().context_length == LONGEST


def test_a_module_of_ones_own_has_no_context() -> None:
    program: Program = load(torch.nn.Linear(4, 4), example_inputs={"input": torch.randn(3, 4)})
    assert program.context_length is None
