"""What is generated against transformers' own ``generate`` of the float model: greedy, with beams, and drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OpenAIGPTConfig

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.ir.decoder_step import decoder_step
from bitlower.ir.generation import continue_prompts, program_stages, stop_tokens, write_targets

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "long": {"num_beams": 4, "length_penalty": 3.0, "early_stopping": True},
    "short": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": "never", "num_return_sequences": 2},
}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 64}
VARIED = {"no_repeat_ngram_size": 1}
"""So that small models do not say one token again and again, whatever searches."""
STOP, PAD, NEW = 9, 1, 8


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_targets_are_those_of_transformers(kind: str, seq2seq: Any) -> None:
    model, batch, program = seq2seq.model_of(kind), seq2seq.source(kind, rows=4, seed=2), seq2seq.traced(kind)
    seen, stages = [], program_stages(program)
    for options in SEARCHES.values():
        settings = {**VARIED, **options}
        expected = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, eos_token_id=STOP, pad_token_id=PAD, **settings
        )
        found = write_targets(program, *stages, batch, max_new_tokens=NEW, stops=[STOP], pad=PAD, **settings)
        assert torch.equal(found, expected), options
        seen.append(found.tolist())
    assert seen[0] != seen[1], "beams find what greedy search does not"


def test_rows_that_have_ended_are_filled_up_and_all_of_them_end_it(seq2seq: Any) -> None:
    batch, program = seq2seq.source("bart"), seq2seq.traced("bart")
    stages = program_stages(program)
    free = write_targets(program, *stages, batch, stops=(), max_new_tokens=6)
    first = free[:, 1].tolist()
    short = write_targets(program, *stages, batch, stops=first, max_new_tokens=6, pad=1)
    assert short.tolist() == [[2, token] for token in first]
    assert free.shape == (2, 7)


def test_a_start_is_taken_as_it_is(seq2seq: Any) -> None:
    batch, program = seq2seq.source("bart"), seq2seq.traced("bart")
    start = torch.tensor([[5, 6], [7, 8]])
    found = write_targets(program, *program_stages(program), batch, start=start, stops=(), max_new_tokens=3)
    assert found[:, :2].tolist() == start.tolist()
    assert found.shape == (2, 5)
    with pytest.raises(BitlowerError, match=r"a start of the shape \[1, 2\] does not fit 2 sources"):
        write_targets(program, *program_stages(program), batch, start=start[:1], stops=(), max_new_tokens=3)


def causal(config: Any) -> tuple[Any, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that the tokens differ
    return model, load(model)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Program]:
    return causal(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest, llama: tuple[Any, Program]) -> tuple[Any, Program]:
    return llama if request.param == "llama" else causal(GPT2Config(**GPT))


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 7, 4 and 1 tokens, padded on the left."""
    ids = torch.randint(10, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :6] = 0, 0
    return ids.masked_fill(mask == 0, PAD), mask


def reference(model: Any, settings: Mapping[str, Any]) -> torch.Tensor:
    ids, mask = prompts()
    result: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=STOP, pad_token_id=PAD, **settings
    )
    return result


def continued(program: Program, **settings: Any) -> torch.Tensor:
    step = decoder_step(program, lambda inputs: program(**inputs))
    options = {"max_new_tokens": NEW, "stops": [STOP], "pad": PAD} | settings
    with torch.no_grad():
        return continue_prompts(program, step, *prompts(), **options)


def test_continuations_are_those_of_transformers(decoder: tuple[Any, Program]) -> None:
    model, program = decoder
    seen = []
    for options in SEARCHES.values():
        expected = reference(model, {"do_sample": False, **options})
        assert torch.equal(continued(program, **options), expected), options
        seen.append(expected.tolist())
    assert seen[0] != seen[1], "beams find what greedy search does not"


def test_without_a_cache_beams_are_reordered_too() -> None:
    model, program = causal(OpenAIGPTConfig(**GPT))
    ids, step = prompts()[0][:1], decoder_step(program, lambda inputs: program(**inputs))
    settings = {"max_new_tokens": NEW, "num_beams": 4}
    expected = model.generate(ids, do_sample=False, eos_token_id=STOP, pad_token_id=PAD, **settings)
    with torch.no_grad():
        assert torch.equal(continue_prompts(program, step, ids, stops=[STOP], pad=PAD, **settings), expected)


def test_what_is_drawn_is_drawn_as_in_transformers(llama: tuple[Any, Program]) -> None:
    model, program = llama
    settings = {"do_sample": True, "top_k": 20, "temperature": 1.5, "repetition_penalty": 1.2}
    torch.manual_seed(3)
    expected = reference(model, settings)
    torch.manual_seed(3)
    assert torch.equal(continued(program, **settings), expected)
    assert not torch.equal(expected, continued(program))


def test_the_models_own_settings_count_but_not_how_it_searches(llama: tuple[Any, Program]) -> None:
    model, program = llama
    own = {"do_sample": True, "num_beams": 3, "repetition_penalty": 3.0, "eos_token_id": 40, "use_cache": False}
    stating = replace(program, assets={"generation_config.json": json.dumps(own).encode()})
    expected = reference(model, {"do_sample": False, "repetition_penalty": 3.0})
    assert torch.equal(continued(stating), expected)
    assert not torch.equal(continued(program), expected)
    assert torch.equal(continued(stating, repetition_penalty=1.0), continued(program))
    first = int(expected[0, 7])
    ending = replace(program, assets={"generation_config.json": json.dumps({"eos_token_id": first}).encode()})
    assert continued(ending, stops=None, repetition_penalty=3.0)[0, 8:].tolist() == [PAD] * (NEW - 1)


def test_stops_are_those_of_the_generation_config_or_else_of_the_configuration(llama: tuple[Any, Program]) -> None:
    program = llama[1].clone()
    for stated, stops in ((1, (1,)), ([1, 7], (1, 7)), (None, ())):
        program.config["eos_token_id"] = stated
        assert stop_tokens(program) == stops
    program.assets["generation_config.json"] = b'{"eos_token_id": [5, 6]}'
    assert stop_tokens(program) == (5, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beans": 4}, "no setting 'num_beans'"),
        ({"num_return_sequences": 2}, "settings for generating do not fit"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"num_beams": 2, "streamer": object()}, "beams are known at the end only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    llama: tuple[Any, Program], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitlowerError, match=message):
        continued(llama[1], **settings)
