"""Questions from SQuAD's files and from JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitlower.ir import BitlowerError
from bitlower.tools.data.questions import Question, read_questions

CONTEXT = "The cat sat. "


def squad(**changes: Any) -> dict[str, Any]:
    one = {"question": "Who?", "id": "a", "answers": [{"text": "cat", "answer_start": 4}, {"text": "The cat"}]}
    other = {"question": "Why?", "id": "b", "answers": [], "is_impossible": True}
    return {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [one | changes, other]}]}],
    }


def test_the_files_of_squad(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad()))
    first, second = read_questions(path)
    assert first == Question("Who?", CONTEXT, ("cat", "The cat"), f"{path}, data[0].paragraphs[0].qas[0]")
    assert second == Question("Why?", CONTEXT, (), f"{path}, data[0].paragraphs[0].qas[1]")
    flat = {"data": [{"question": "Who?", "context": CONTEXT, "answers": {"text": ["cat"], "answer_start": [4]}}]}
    path.write_text(json.dumps(flat))
    assert read_questions(path) == [Question("Who?", CONTEXT, ("cat",), f"{path}, data[0]")]


@pytest.mark.parametrize("answers", [["cat"], "cat", {"text": ["cat"], "answer_start": [4]}, [{"text": "cat"}]])
def test_json_lines(tmp_path: Path, answers: Any) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps({"q": "Who?", "c": CONTEXT, "a": answers}) + "\n")
    expected = [Question("Who?", CONTEXT, ("cat",), f"{path}, line 1")]
    assert read_questions(path, ("q", "c", "a")) == expected
    path.write_text(json.dumps({"question": "Who?", "context": CONTEXT, "answers": answers}) + "\n")
    assert read_questions(path) == expected


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("a.json", squad(question=""), "data[0].paragraphs[0].qas[0]: 'question' is no text, or empty"),
        ("a.json", squad(answers=[3]), "qas[0]: 'answers' holds something else than texts"),
        ("a.json", squad(answers=None), "qas[0]: no 'answers'"),
        ("a.json", {"data": [{"paragraphs": [{"qas": [{"question": "Who?", "answers": []}]}]}]}, "no 'context'"),
        ("a.json", {"data": [{"paragraphs": 3}]}, "data[0].paragraphs is no list of objects"),
        ("a.json", {"version": "2"}, "data is no list of objects"),
        ("a.json", {"data": []}, "holds no questions"),
        ("a.json", [], "cannot read the data file"),
        ("a.jsonl", {"question": "Who?", "answer": [], "context": "x"}, "line 1: no 'answers'; did you mean 'answer'"),
        ("a.tsv", {}, "neither .json nor .jsonl"),
    ],
)
def test_mistakes_are_named_by_file_and_place(tmp_path: Path, name: str, form: Any, message: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(form))
    with pytest.raises(BitlowerError) as caught:
        read_questions(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_columns_are_those_of_json_lines(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match=r"three columns of a \.jsonl file"):
        read_questions(tmp_path / "a.json", ("q", "c", "a"))
    with pytest.raises(BitlowerError, match=r"three columns of a \.jsonl file"):
        read_questions(tmp_path / "a.jsonl", ("q",))
