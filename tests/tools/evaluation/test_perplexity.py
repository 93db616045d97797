"""Perplexity against transformers' own loss, for all variants; what it takes and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitlower.frontends.tokenize import token_ids
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.tools.evaluation.language_model import LanguageModel
from bitlower.tools.evaluation.perplexity import evaluate_text, perplexity


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 30, (83,), generator=torch.Generator().manual_seed(0))


def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """-log p of each token but the first."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def test_windows_that_do_not_overlap(llama_program: Program, model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        parts = [float(model(part[None], labels=part[None]).loss) for part in ids[:80].split(20)]
    found = perplexity(llama_program, ids, window=20)
    assert found.perplexity == pytest.approx(math.exp(sum(parts) / 4), rel=1e-5)
    assert (found.windows, found.window, found.stride, found.tokens_scored, found.tokens) == (4, 20, 20, 76, 83)
    two = perplexity(llama_program, ids, window=20, windows=2)
    assert two.perplexity == pytest.approx(math.exp(sum(parts[:2]) / 2), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 6, 19, 20])
def test_with_a_stride_no_token_counts_twice(
    llama_program: Program, model: Any, ids: torch.Tensor, stride: int
) -> None:
    text, scored = ids[:41], {}
    for start in range(0, 41 - 20 + 1, stride):
        for offset, loss in enumerate(losses(model, text[start : start + 20]).tolist(), start=start + 1):
            scored.setdefault(offset, loss)
    found = perplexity(llama_program, text, window=20, stride=stride)
    fresh = min(stride, 19)
    if stride < 20:  # with the whole window as stride the first token of each is not predicted
        assert found.tokens_scored == 19 + (found.windows - 1) * fresh == len(scored)
    assert found.perplexity == pytest.approx(math.exp(sum(scored.values()) / len(scored)), rel=1e-5)


def test_a_file_is_scored_as_it_is_or_with_its_lines_joined(
    llama: Path, llama_program: Program, story: Path, traced: None
) -> None:
    lines = story.read_text().splitlines()
    whole = evaluate_text(llama, story, window=16, windows=3)
    assert whole.perplexity == perplexity(
        llama_program, token_ids(llama_program, story.read_text()), window=16, windows=3
    )
    (story.parent / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    rows = evaluate_text(llama, f"{story.parent / 'rows.jsonl'}:text", joiner=" <unk> ", window=16, windows=3)
    joined = evaluate_text(llama, story, joiner=" <unk> ", window=16, windows=3)
    assert rows.perplexity == joined.perplexity != whole.perplexity
    assert json.loads(json.dumps(joined.to_dict()))["joiner"] == " <unk> "


def test_prompts_alone(llama: Path, traced: None) -> None:
    found = evaluate_text(llama, prompts=["the cat", "rain"], new_tokens=3)
    assert found.perplexity is None
    assert [sample.prompt for sample in found.samples] == ["the cat", "rain"]
    assert found.to_dict().keys() == {"target", "task", "runtime", "bos", "begins", "samples"}
    with pytest.raises(BitlowerError, match="nothing to evaluate on"):
        evaluate_text(llama)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"window": 65}, "windows of 65 tokens do not fit the model; it takes 2 to 64 tokens"),
        ({"window": 1}, "windows of 1 tokens"),
        ({"window": 20, "stride": 0}, "a stride of 0"),
        ({"window": 20, "stride": 21}, "a stride of 21"),
        ({"window": 20, "windows": 5}, "83 tokens, that is 4 windows of 20; 5 windows cannot be had"),
        ({"window": 20, "windows": 0}, "0 windows cannot be had"),
    ],
)
def test_numbers_that_make_no_sense(
    llama_program: Program, ids: torch.Tensor, numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(BitlowerError) as caught:
        perplexity(llama_program, ids, **numbers)
    assert message in str(caught.value)


def test_nan_is_no_perplexity(llama_program: Program, ids: torch.Tensor) -> None:
    broken = LanguageModel(llama_program, lambda feed, cache: (torch.full((1, 20, 45), math.nan), None), "a stub")
    with pytest.raises(CheckError, match="NaN for the window of tokens 0 to 20"):
        perplexity(broken, ids, window=20)
    sure = torch.full((1, 20, 45), -1e6)
    sure[..., 0] = 0.0
    endless = LanguageModel(llama_program, lambda feed, cache: (sure, None), "a stub")
    assert perplexity(endless, ids, window=20).perplexity == math.inf
