"""Token classification, against transformers one sentence at a time and entities counted by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches, load
from bitlower.ir import BitlowerError, Program
from bitlower.tools.evaluation.evaluate import evaluate

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LINES = (
    "the cats sing near rivers",
    "a small bird",
    "quick dogs , never under old houses with snow and rain",
    "wind",
)
SENTENCES = [line.split() for line in LINES]


@pytest.fixture(scope="module")
def tagger(save_head: Callable[..., Path]) -> Path:
    return save_head("TokenClassification", id2label=dict(enumerate(TAGS)))


@pytest.fixture(scope="module")
def program(tagger: Path) -> Program:
    return load(str(tagger))


@pytest.fixture(scope="module")
def tag(tagger: Path) -> Callable[..., list[str]]:
    """``tag(words, limit)``: transformers, a sentence at a time; the class at the first piece of each word."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(tagger).eval()
    tokenizer = AutoTokenizer.from_pretrained(tagger)

    def classes(words: list[str], limit: int = 64) -> list[str]:
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        tokens = [i for piece in pieces for i in piece][: limit - 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id]])).logits
        starts = [sum(map(len, pieces[:place])) for place in range(len(words))]
        return [TAGS[int(logits[0, 1 + start].argmax())] for start in starts if start < len(tokens)]

    return classes


@pytest.fixture(scope="module")
def predicted(tag: Callable[..., list[str]]) -> list[list[str]]:
    return [tag(words) for words in SENTENCES]


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of each entity of IOB2 tags; an I of another type, or behind none, begins one."""
    result, start = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and not (tag.startswith("I-") and tag[2:] == tags[start][2:]):
            result.add((tags[start][2:], start, place - 1))
            start = None
        if tag != "O" and start is None:
            start = place
    return result


def figures(gold: list[list[str]], said: list[list[str]]) -> dict[str, float]:
    wanted, answered = ({(i, *e) for i, row in enumerate(side) for e in entities(row)} for side in (gold, said))
    hits, words = (
        len(wanted & answered),
        [(a, b) for r, s in zip(gold, said, strict=True) for a, b in zip(r, s, strict=True)],
    )
    return {
        "accuracy": 100 * sum(a == b for a, b in words) / len(words),
        "f1": 200 * hits / (len(wanted) + len(answered)),
        "precision": 100 * hits / len(answered),
        "recall": 100 * hits / len(wanted),
    }


def changed(tags: list[list[str]]) -> list[list[str]]:
    """Other tags at every third word."""
    return [
        [TAGS[(TAGS.index(tag) + 1) % 5] if (place + line) % 3 == 0 else tag for place, tag in enumerate(row)]
        for line, row in enumerate(tags)
    ]


def conll(path: Path, tags: list[list[str]]) -> Path:
    lines = ("".join(f"{w} {t}\n" for w, t in zip(ws, ts, strict=True)) for ws, ts in zip(SENTENCES, tags, strict=True))
    path.write_text("\n".join(lines))
    return path


def test_against_transformers(tagger: Path, program: Program, predicted: list[list[str]], tmp_path: Path) -> None:
    assert len({tag for row in predicted for tag in row}) > 2
    gold = changed(predicted)
    result = evaluate(tagger, "token-classification", conll(tmp_path / "data.conll", gold), batch_size=3)
    expected = figures(gold, predicted)
    assert 0 < expected["f1"] < 100
    assert result.metrics == pytest.approx(expected)
    assert (result.samples, result.notes) == (4, ())
    own = evaluate(program, "token-classification", conll(tmp_path / "own.conll", predicted))
    assert set(own.metrics.values()) == {100.0}


def test_ids_in_json_lines_are_the_same(program: Program, predicted: list[list[str]], tmp_path: Path) -> None:
    gold, path = changed(predicted), tmp_path / "data.jsonl"
    rows = zip(SENTENCES, gold, strict=True)
    path.write_text("".join(json.dumps({"w": w, "t": [TAGS.index(tag) for tag in t]}) + "\n" for w, t in rows))
    result = evaluate(program, "token-classification", f"{path}:w,t")
    assert result.metrics == pytest.approx(figures(gold, predicted))


def test_words_beyond_the_limit_do_not_count_and_are_counted(
    program: Program, tag: Callable[..., list[str]], tmp_path: Path
) -> None:
    sentence, path = SENTENCES[2], tmp_path / "data.txt"
    answers = tag(sentence, 7)  # five pieces: quick, dog, ##s, a comma, never
    assert len(answers) == 4
    gold = [*answers[:3], "O" if answers[3] != "O" else "B-PER", *["O"] * 7, "O"]
    path.write_text("".join(f"{w} {t}\n" for w, t in zip([*sentence, "\u200b"], gold, strict=True)))
    result = evaluate(program, "token-classification", path, max_length=7)
    assert result.metrics["accuracy"] == 75.0
    assert result.notes == (
        "7 of 12 words are beyond what the model or max_length takes (1 sentences are cut)",
        "1 of 12 words have no token, and do not count",
    )


def test_an_artifact_tags_as_its_program(program: Program, predicted: list[list[str]], tmp_path: Path) -> None:
    path, output = conll(tmp_path / "data.conll", changed(predicted)), tmp_path / "artifact"
    output.mkdir()
    OnnxQdq().export(program, output, batches(program, ["the cat sings", "a dog"]))
    of_artifact = evaluate(output, "token-classification", path)
    assert of_artifact.metrics == evaluate(program, "token-classification", path).metrics


def test_tags_of_no_entities_have_an_accuracy_alone(program: Program, tmp_path: Path) -> None:
    program = replace(program, config={**program.config, "id2label": {str(i): f"LABEL_{i}" for i in range(5)}})
    path = tmp_path / "data.txt"
    path.write_text("the LABEL_0\ncat LABEL_1\n")
    result = evaluate(program, "token-classification", path)
    assert set(result.metrics) == {"accuracy"}
    assert result.notes == ("the tags name no entities (B-…, I-…), so that there is no F1 by entity",)


def test_mistakes_are_named_before_the_model_is_loaded(
    tagger: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    path = tmp_path / "data.txt"
    path.write_text("the O\ncat B-ORG\n")
    monkeypatch.setattr("bitlower.tools.evaluation.tags.open_runner", refuse)
    with pytest.raises(BitlowerError, match=r"data.txt, line 2: 'B-ORG' is no label; .* or names"):
        evaluate(tagger, "token-classification", path)
    with pytest.raises(BitlowerError, match="no model folder at"):
        evaluate("nowhere", "token-classification", path)
    path.write_text("the O\n")
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(BitlowerError, match="needs the package seqeval; install it"):
        evaluate(tagger, "token-classification", path)


def test_the_model_must_give_logits_for_each_token(tiny_program: Program, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("the LABEL_0\n")
    with pytest.raises(BitlowerError, match=r"token-classification needs logits \[…, …, 2\], and .* gives hidden: "):
        evaluate(tiny_program, "token-classification", path)
