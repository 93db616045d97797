"""Question answering, against transformers and a search over all spans, and against SQuAD's definitions."""

from __future__ import annotations

import json
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches, load
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.tools.evaluation.answers import LONGEST_ANSWER, best_span
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.evaluation.runners import Runner, open_runner

CONTEXTS = (
    "the old cat sings near red river ,  and the small dog sleeps under quick bird . rain falls never with snow",
    "a quick bird comes ; the wind stays",
    "red houses and trees , but never snow , because the wind goes over a river and a dog runs with a cat",
)
QUESTIONS = ("the cat sings ?", "a bird", "red house")
LIMIT = 20


@pytest.fixture(scope="module")
def model(save_head: Callable[..., Path]) -> Path:
    return save_head("QuestionAnswering")


@pytest.fixture(scope="module")
def program(model: Path) -> Program:
    return load(str(model))


@pytest.fixture(scope="module")
def answers(model: Path) -> list[str]:
    """The text of the best span of each question: each window alone, each pair of tokens looked at."""
    network = AutoModelForQuestionAnswering.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [answer(network, tokenizer, *pair) for pair in zip(QUESTIONS, CONTEXTS, strict=True)]


def answer(network: Any, tokenizer: Any, question: str, context: str) -> str:
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    tokens, spans = encoded["input_ids"], encoded["offset_mapping"]
    room = LIMIT - 3 - len(asked)
    head = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id]
    best = (-np.inf, "")
    for first in range(0, max(1, len(tokens) - room // 2), room - room // 2):
        part = tokens[first : first + room]
        ids = torch.tensor([[*head, *part, tokenizer.sep_token_id]])
        types = torch.tensor([[0] * len(head) + [1] * (len(part) + 1)])
        with torch.no_grad():
            out = network(input_ids=ids, token_type_ids=types)
        start, end = (logits[0].double().numpy() for logits in (out.start_logits, out.end_logits))
        for i in range(len(part)):
            for j in range(i, min(len(part), i + 30)):
                score = start[len(head) + i] + end[len(head) + j]
                if score > best[0]:
                    best = (score, context[spans[first + i][0] : spans[first + j][1]])
    return best[1]


def normal(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def f1(said: str, right: str) -> float:
    a, b = normal(said), normal(right)
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def write(path: Path, rights: list[list[str]]) -> Path:
    rows = zip(QUESTIONS, CONTEXTS, rights, strict=True)
    path.write_text("".join(json.dumps({"question": q, "context": c, "answers": a}) + "\n" for q, c, a in rows))
    return path


def test_against_transformers_and_all_spans(model: Path, answers: list[str], tmp_path: Path) -> None:
    rights = [["snow", f"The {answers[0].upper()}!"], [f"{answers[1]} wind rain"], [f"some {answers[2]}"]]
    path = write(tmp_path / "dev.jsonl", rights)
    result = evaluate(model, "question-answering", path, max_length=LIMIT, batch_size=2)
    scores = [max(f1(text, right) for right in row) for text, row in zip(answers, rights, strict=True)]
    assert all(map(normal, answers))
    assert scores[0] == 1
    assert all(0 < score < 1 for score in scores[1:])
    assert result.metrics == pytest.approx({"f1": 100 * np.mean(scores), "exact_match": 100 / 3}, abs=1e-4)
    assert result.samples == 3
    assert re.fullmatch(r"2 of 3 contexts are longer than a window, and are read in \d that .*", result.notes[0])


def test_no_answer_is_one_where_the_file_has_such_questions(
    program: Program, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows with ``wind`` score no answer most; all windows of the second context have it, and one of the third."""
    wind = AutoTokenizer.from_pretrained(program.source).convert_tokens_to_ids("wind")
    plain = open_runner(program)

    def run(batch: Batch) -> dict[str, Any]:
        outputs = plain.run(batch)
        outputs["start_logits"][(batch["input_ids"] == wind).any(1).numpy(), 0] += 100
        return outputs

    monkeypatch.setattr("bitlower.tools.evaluation.answers.open_runner", lambda _: Runner(program, run))
    path = write(tmp_path / "dev.jsonl", [[answers[0]], [], []])
    result = evaluate(program, "question-answering", path, max_length=LIMIT)
    assert result.metrics["exact_match"] == pytest.approx(200 / 3, abs=1e-4)
    assert result.notes[1] == "2 of 3 questions have no answer, and the model may say so"
    write(path, [[answer] for answer in answers])
    assert evaluate(program, "question-answering", path, max_length=LIMIT).metrics["exact_match"] == 100


def test_an_artifact_answers_as_its_program(program: Program, answers: list[str], tmp_path: Path) -> None:
    path, output = write(tmp_path / "dev.jsonl", [[answer] for answer in answers]), tmp_path / "artifact"
    output.mkdir()
    OnnxQdq().export(program, output, batches(program, ["the cat sings", "a dog"], pairs=["a bird", "snow"]))
    assert evaluate(output, "question-answering", path, max_length=LIMIT).metrics == {"f1": 100.0, "exact_match": 100.0}


def test_the_best_span_of_random_scores() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 5, 80):
        start, end = generator.normal(size=(2, count)).astype(np.float32)
        pairs = [(i, j) for i in range(count) for j in range(i, min(count, i + LONGEST_ANSWER))]
        expected = max(pairs, key=lambda pair: float(start[pair[0]]) + float(end[pair[1]]))
        assert best_span(start, end)[1:] == expected


def test_what_is_wrong_is_named(
    model: Path, tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "dev.jsonl", [["a"]] * 3)
    with pytest.raises(BitlowerError, match=r"question-answering needs start_logits \[…, …\], and"):
        evaluate(tiny_program, "question-answering", path)
    with pytest.raises(BitlowerError, match=r"dev.jsonl, line 1: the question has 4 tokens, which leave no room"):
        evaluate(model, "question-answering", path, max_length=8)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    with pytest.raises(BitlowerError, match="needs the package torchmetrics; install it"):
        evaluate(model, "question-answering", path)
