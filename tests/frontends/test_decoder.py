import inspect
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from bitlower.frontends import load
from bitlower.frontends.decoder import Signature, cache_argument, cache_of
from bitlower.ir import BitlowerError, Program
from bitlower.ir.verifier import verify

VOCABULARY = 96
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mistral": MistralConfig(**LLAMA, sliding_window=3),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-post-norm": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96),
}


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request) -> tuple[torch.nn.Module, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model, load(model)


def step(program: Program, ids: torch.Tensor, mask: torch.Tensor, past: dict[str, torch.Tensor]):
    """One call as a runtime makes it: the tokens, the mask over past and tokens, the cache."""
    inputs = {"input_ids": ids, "attention_mask": mask, **past}
    if any(spec.name == "position_ids" for spec in program.inputs):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    outputs = program(**inputs)
    cache = {name.replace("present", "past_key_values"): v for name, v in outputs.items() if name != "logits"}
    return outputs["logits"], cache


def test_interface(decoder) -> None:
    _, program = decoder
    verify(program)
    inputs = {spec.name: str(spec.type) for spec in program.inputs}
    assert program.task == "text-generation"
    assert inputs["input_ids"] == "int64[batch, sequence]"
    assert inputs["attention_mask"] == "int64[batch, past + sequence]"
    heads = program.config.get("num_key_value_heads") or 4
    assert inputs["past_key_values.1.value"] == f"float32[batch, {heads}, past, 8]"
    outputs = {spec.name: str(spec.type) for spec in program.outputs}
    assert outputs["present.0.key"] == f"float32[batch, {heads}, past + sequence, 8]"
    assert list(outputs) == ["logits", *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value"))]


def test_prompt_then_token_by_token_equals_the_model_on_all_at_once(decoder) -> None:
    model, program = decoder
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **positions_of(model, mask)).logits
        logits, past = step(program, ids[:, :6], mask[:, :6], {})
        parts = [logits]
        for position in range(6, 9):
            logits, past = step(program, ids[:, position : position + 1], mask[:, : position + 1], past)
            parts.append(logits)
    actual = torch.cat(parts, 1)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(actual[0, 2:], expected[0, 2:], rtol=0, atol=2e-5)


def positions_of(model: torch.nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    takes = Signature.of(model).takes_positions
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}


def test_an_empty_past_may_be_left_out(decoder) -> None:
    _, program = decoder
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits, _ = step(program, ids, torch.ones_like(ids), {})
        empty = {name: value for name, value in program.complete({"input_ids": ids}).items() if "past" in name}
        full, _ = step(program, ids, torch.ones_like(ids), empty)
    assert len(empty) == 4
    assert torch.equal(logits, full)


def test_tied_embedding_and_head_are_one_parameter() -> None:
    program = load(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    tables = [name for name, tensor in program.tensors() if tensor.shape == (VOCABULARY, 32)]
    assert len(tables) == 1
    node = next(n for n in program.graph.find_nodes(op="get_attr") if f"model/{n.target}" == tables[0])
    assert sorted(str(user.target) for user in node.users) == ["aten.embedding.default", "aten.linear.default"]


def test_untied_tables_stay_two() -> None:
    program = load(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, tie_word_embeddings=False)))
    assert len([name for name, tensor in program.tensors() if tensor.shape == (VOCABULARY, 32)]) == 2


def test_half_precision_weights_are_traced_in_float32() -> None:
    program = load(AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.bfloat16))
    assert {tensor.dtype for _, tensor in program.tensors() if tensor.is_floating_point()} == {torch.float32}


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(BitlowerError, match="T5ForConditionalGeneration"):
        load(T5ForConditionalGeneration(config), task="text-generation")


def test_a_model_without_a_cache_takes_tokens_and_mask_alone() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=24)
    ).eval()
    program = load(model)
    verify(program)
    signature = {spec.name: str(spec.type) for spec in (*program.inputs, *program.outputs)}
    assert signature == {
        "input_ids": "int64[batch, sequence]",
        "attention_mask": "int64[batch, sequence]",
        "logits": f"float32[batch, sequence, {VOCABULARY}]",
    }
    assert program.context_length == 24
    assert any("no KV cache" in note for note in program.notes)
    for rows, length, padding in ((1, 24, 0), (3, 7, 2)):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        found = program(input_ids=ids, attention_mask=mask)["logits"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_with_a_state_of_another_kind_is_refused_in_one_line() -> None:
    config = RwkvConfig(hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, vocab_size=VOCABULARY)
    with pytest.raises(BitlowerError, match=r"keeps a state between tokens that is no keys .* a loop"):
        load(AutoModelForCausalLM.from_config(config).eval(), task="text-generation")


class Earlier(torch.nn.Module):
    """The signature of earlier releases of transformers."""

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> dict[str, object]:
        return {"past_key_values": past_key_values}


def test_the_cache_goes_by_the_name_that_the_installed_transformers_has() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        load(model)
    assert not [str(warning.message) for warning in raised if "past_key_values" in str(warning.message)]
    assert cache_argument(model) in inspect.signature(model.forward).parameters
    assert cache_argument(Earlier()) == "past_key_values"
    assert cache_of(Earlier()(torch.zeros(1), "state")) == "state"
    assert cache_of({"logits": 0}) is None
