"""onnxruntime-genai generates from an artifact what transformers' ``generate`` does, with the model's own settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitlower.backends.onnx_qdq import export
from bitlower.backends.onnx_qdq.write.genai_search import generation
from bitlower.frontends import load
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import Level, Program

genai = pytest.importorskip("onnxruntime_genai")

VOCABULARY, CONTEXT, LENGTH = 64, 48, 32
PROMPT = [5, 8, 20, 33, 7]


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    """A Llama of random weights that names no end, and continues ``PROMPT`` with token 0 among others."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        common = reference(made)[len(PROMPT) + 4]
        made.lm_head.weight[[common, 0]] = made.lm_head.weight[[0, common]].clone()
    return made


def reference(model: transformers.LlamaForCausalLM, **settings: Any) -> list[int]:
    """What transformers generates; the padding token stands for nothing."""
    model.generation_config = transformers.GenerationConfig(pad_token_id=3, **{"max_length": LENGTH, **settings})
    return model.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)).long())[0].tolist()


@pytest.fixture(scope="module")
def program(model: transformers.LlamaForCausalLM) -> Program:
    return load(model)


@pytest.fixture(scope="module")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai")
    assert program.level is Level.FLOAT
    report = export(program, folder, batches=random_windows(program, count=1, length=8))
    assert report.to_dict()["notes"] == [
        "the model names no token that ends a text, and onnxruntime-genai needs one: it takes the padding token, 3"
    ]
    return folder


def described(program: Program, **settings: Any) -> Any:
    """What the artifact of ``program`` says if its ``generation_config.json`` has ``settings``."""
    named = program.clone()
    named.assets["generation_config.json"] = json.dumps(settings).encode()
    return generation(named, VOCABULARY, CONTEXT)


def generated(artifact: Path, said: Any) -> list[int]:
    """What onnxruntime-genai generates with these settings."""
    path = artifact / "genai_config.json"
    form = json.loads(path.read_text())
    form["model"] |= said.tokens
    form["search"] = said.search
    path.write_text(json.dumps(form))
    parameters = genai.GeneratorParams(runtime := genai.Model(str(artifact)))
    generator = genai.Generator(runtime, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def test_the_continuation_holds_the_token_that_is_easily_taken_for_an_end(model) -> None:
    free = reference(model)
    assert 0 in free[len(PROMPT) :]
    assert 3 not in free
    assert len(free) == LENGTH


SETTINGS: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"max_length": 12},
    {"eos": 6}, {"eos": 6, "min_length": 20}, {"eos": (7, 6)}, {"eos": 6, "min_length": 15, "repetition_penalty": 1.3},
    {"eos": 12, "num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda given: ",".join(given) or "none")
def test_tokens_are_those_of_transformers(model, program, artifact: Path, settings: dict[str, Any]) -> None:
    """``eos`` names ends by their place in the free continuation."""
    given, free = dict(settings), reference(model)
    places = given.pop("eos", None)
    if places is not None:
        ends = [free[len(PROMPT) + place] for place in (places if isinstance(places, tuple) else (places,))]
        given["eos_token_id"] = ends if isinstance(places, tuple) else ends[0]
    expected = reference(model, **given)
    found = generated(artifact, described(program, **{"max_length": LENGTH, **given}, pad_token_id=3))
    ends = given.get("eos_token_id", [])
    whole = expected[:-1] if expected[-1] in (ends if isinstance(ends, list) else [ends]) else expected
    assert found[: len(whole)] == whole
    assert len(found) - len(whole) in (0, len(expected) - len(whole))
    assert settings == {} or expected != free


def test_what_the_runtime_does_not_know_is_named(program: Program) -> None:
    said = described(
        program, typical_p=0.9, min_p=0.05, max_new_tokens=30, suppress_tokens=[4], diversity_penalty=0.0,
        encoder_repetition_penalty=1.0, transformers_version="5", use_cache=True, output_scores=True, eos_token_id=2,
        early_stopping="never", num_return_sequences=3, top_k=7, do_sample=True,
    )  # fmt: skip
    assert said.notes == (
        "onnxruntime-genai takes no early_stopping of 'never'; it is left out",
        "onnxruntime-genai gives no 3 sequences a prompt; it gives 1",
        "generation_config.json has settings that onnxruntime-genai does not know: max_new_tokens, min_p, "
        "suppress_tokens, typical_p",
    )
    assert (said.search["top_k"], said.search["do_sample"]) == (7, True)
    assert not {"early_stopping", "min_p"} & set(said.search)


def test_without_a_padding_token_the_last_row_is_the_end(program: Program) -> None:
    program = replace(program, config={})
    said = described(program)
    assert said.tokens == {"bos_token_id": 0, "eos_token_id": 63, "pad_token_id": 63}
    assert said.notes[0].endswith("it takes the last one, 63")


def test_ends_beyond_the_vocabulary_are_left_out(program: Program) -> None:
    assert described(program, eos_token_id=[70, 9, 8], pad_token_id=70).tokens == {
        "bos_token_id": 0, "eos_token_id": [9, 8], "pad_token_id": 9
    }  # fmt: skip


def test_lengths_stay_within_the_context(program: Program) -> None:
    assert described(program, max_length=4000).search["max_length"] == CONTEXT
    assert described(program, max_length=20).search["max_length"] == CONTEXT, "the default of transformers"
    assert described(program).search["max_length"] == CONTEXT
