"""Windows begin with what the model's tokenizer puts first: in calibration, in perplexity, before prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitlower.frontends.tokenize import text_ids, window_lead
from bitlower.ir import BitlowerError, Program
from bitlower.passes._machinery.digest import digest_batches
from bitlower.tools.data.sources import python_source, recipe_source
from bitlower.tools.evaluation.generation import sample
from bitlower.tools.evaluation.perplexity import evaluate_text, perplexity
from bitlower.tools.runs.flow import standard_recipe

BOS = 0


@pytest.fixture(scope="module")
def program(llama_program: Program) -> Program:
    """The tiny Llama, whose tokenizer puts ``<s>`` in front of a text and ``</s>`` behind it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    made = llama_program.clone()
    tokenizer = Tokenizer.from_str(made.assets["tokenizer.json"].decode())
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.assets["tokenizer.json"] = tokenizer.to_str().encode()
    return made


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def losses(model: Any, ids: torch.Tensor) -> list[float]:
    """``-log p`` of each token but the first, by transformers."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    return cross_entropy(logits[:-1].double(), ids[1:], reduction="none").tolist()


def test_the_rule_says_what_windows_begin_with(program: Program, llama_program: Program) -> None:
    assert [window_lead(program, bos) for bos in ("auto", "always", "never")] == [(BOS,), (BOS,), ()]
    assert [window_lead(llama_program, bos) for bos in ("auto", "always", "never")] == [(), (BOS,), ()]
    with pytest.raises(BitlowerError, match="unknown rule 'allways' for the beginning of windows; did you mean"):
        window_lead(program, "allways")


def test_a_tokenizer_without_such_a_token_has_no_always(llama_program: Program) -> None:
    bare = llama_program.clone()
    settings = json.loads(bare.assets["tokenizer_config.json"])
    bare.assets["tokenizer_config.json"] = json.dumps({**settings, "bos_token": None}).encode()
    assert window_lead(bare) == ()
    with pytest.raises(BitlowerError, match="has no token that begins a text; bos is auto or never"):
        window_lead(bare, "always")


def test_each_window_of_perplexity_begins_with_it_and_all_of_its_text_is_predicted(program: Program, model) -> None:
    ids = text_ids(program, "the cat sings and a dog runs under the old tree " * 6)
    found = perplexity(program, ids, window=20, lead=(BOS,))
    parts = [losses(model, torch.cat([torch.tensor([BOS]), ids[i : i + 19]])) for i in range(0, len(ids) - 18, 19)]
    scored = [loss for part in parts for loss in part]
    assert (found.windows, found.window, found.stride) == (len(parts), 20, 19)
    assert found.tokens_scored == 19 * len(parts) == len(scored)
    assert found.perplexity == pytest.approx(math.exp(sum(scored) / len(scored)), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 18, 19])
def test_with_a_stride_no_token_counts_twice(program: Program, model, stride: int) -> None:
    ids, scored = text_ids(program, "the cat sings and a dog runs under the old tree " * 4)[:41], {}
    for start in range(0, 41 - 19 + 1, stride):
        part = losses(model, torch.cat([torch.tensor([BOS]), ids[start : start + 19]]))
        for place, loss in enumerate(part, start=start):
            scored.setdefault(place, loss)
    found = perplexity(program, ids, window=20, stride=stride, lead=(BOS,))
    assert found.tokens_scored == len(scored)
    assert found.perplexity == pytest.approx(math.exp(sum(scored.values()) / len(scored)), rel=1e-5)
    with pytest.raises(BitlowerError, match="a stride of 20 makes no sense; take 1 to 19"):
        perplexity(program, ids, window=20, stride=20, lead=(BOS,))


def test_an_evaluation_says_what_windows_began_with(program: Program, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bitlower.tools.evaluation.language_model.load", lambda model: program.clone())
    text = tmp_path / "text.txt"
    text.write_text("the cat sings and a dog runs under the old tree " * 6)
    auto, never = (evaluate_text("model", text, window=16, windows=2, bos=bos).to_dict() for bos in ("auto", "never"))
    assert (auto["bos"], auto["begins"], auto["lead"], auto["tokens_scored"]) == ("auto", "<s>", [BOS], 30)
    assert (never["bos"], never["begins"], never["lead"], never["tokens_scored"]) == ("never", "", [], 30)
    assert auto["perplexity"] != never["perplexity"]
    assert auto["tokens"] == never["tokens"] == 66, "neither <s> nor </s> is of the text"


def test_prompts_begin_with_it_and_do_not_end(program: Program) -> None:
    assert sample(program, "the cat", 1).prompt_tokens == 3
    assert sample(program, "the cat", 1, bos="never").prompt_tokens == 2
    with pytest.raises(BitlowerError, match="a prompt has no token"):
        sample(program, "", 1, bos="never")


def test_calibration_windows_begin_with_it_and_keep_their_length(program: Program, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sings and a dog runs under the old tree " * 30)
    found = {}
    for bos in ("auto", "always", "never"):
        recipe = standard_recipe("package:model", "W8A8", text, samples=3, max_length=16, bos=bos)
        data = recipe_source(recipe, decoder=True).batches(program)
        rows = torch.cat([batch["input_ids"] for batch in (*data.calibration, *data.evaluation)])
        assert rows.shape == (5, 16)
        assert data.lead == (() if bos == "never" else (BOS,))
        assert bool((rows[:, 0] == BOS).all()) == (bos != "never")
        assert not bool((rows[:, 1:] == BOS).any())
        found[bos] = digest_batches(data.calibration)
        given = python_source(text, samples=3, seed=0, max_length=16, decoder=True, bos=bos).batches(program)
        assert digest_batches(given.calibration) == found[bos], "the key of the cache"
    assert found["auto"] == found["always"] != found["never"]
    ids = text_ids(program, text.read_text())
    starts = {tuple(ids[i : i + 15].tolist()) for i in range(0, len(ids) - 14, 15)}
    recipe = standard_recipe("package:model", "W8A8", text, samples=3, max_length=16)
    for batch in recipe_source(recipe, decoder=True).batches(program).calibration:
        assert tuple(batch["input_ids"][0, 1:].tolist()) in starts


def test_models_that_read_texts_have_no_such_rule(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text\n" * 20)
    recipe = standard_recipe("package:model", "W8A8", tmp_path / "text.txt", bos="never")
    assert recipe.model.bos == "never"
    with pytest.raises(BitlowerError, match="bos 'never' is about the windows of language models"):
        recipe_source(recipe, decoder=False)
    with pytest.raises(BitlowerError, match="unknown rule 'first'"):
        python_source(None, samples=None, seed=0, max_length=None, decoder=True, bos="first")
