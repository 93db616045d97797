"""Words and tags from CoNLL files and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitlower.ir import BitlowerError
from bitlower.tools.data.tagged import read_tagged

CONLL = """\
-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O
Peter\tNNP\tB-NP\tB-PER
 \t
# , , O
"""


def test_the_files_of_conll_2003(tmp_path: Path) -> None:
    path = tmp_path / "valid.conll"
    path.write_text(CONLL)
    first, second, third = read_tagged(path)
    assert (first.words, first.tags, first.lines) == (("EU", "rejects"), ("B-ORG", "O"), (3, 4))
    assert (second.words, second.tags, second.lines) == (("Peter",), ("B-PER",), (7,))
    assert (third.words, third.tags) == (("#",), ("O",))
    assert read_tagged(path, ("0", "1"))[0].tags == ("NNP", "VBZ")


@pytest.mark.parametrize(("words", "tags"), [("tokens", "ner_tags"), ("tokens", "tags"), ("words", "labels")])
def test_json_lines(tmp_path: Path, words: str, tags: str) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"id": "0", words: ["EU", "rejects"], tags: [3, 0]}, {words: [], tags: []}, {words: ["x"], tags: ["B-LOC"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_tagged(path)
    assert (first.words, first.tags, first.lines) == (("EU", "rejects"), ("3", "0"), (1, 1))
    assert (second.words, second.tags, second.lines) == (("x",), ("B-LOC",), (3,))
    assert read_tagged(path, (words, tags)) == [first, second]


def test_a_tag_is_a_name_or_a_number_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("a O\nb B-X\n\nc 1\nd I-X\n")
    first, second = read_tagged(path)
    assert first.tag_ids(path, {"O": 0, "B-X": 1}) == [0, 1]
    with pytest.raises(BitlowerError, match=r"data.txt, line 5: 'I-X' is no label.*did you mean 'B-X'"):
        second.tag_ids(path, {"O": 0, "B-X": 1})


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.txt", "EU O\nalone\n", (), "line 2: 1 columns, a word and its tag are needed"),
        ("a.txt", "EU O\n", ("0", "3"), "line 1: 2 columns, column 3 is asked for"),
        ("a.txt", "EU O\n", ("word", "tag"), "columns of a CoNLL file are numbers from 0"),
        ("a.txt", "EU O\n", ("0",), "takes two columns"),
        ("a.txt", "\n\n", (), "holds no sentences"),
        ("a.jsonl", '{"tokens": ["a"]}', (), "line 1: no column 'ner_tags' or 'tags' or 'labels'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [0, 1]}', (), "line 1: 1 words have 2 tags"),
        ("a.jsonl", '{"tokens": "a", "tags": [0]}', (), "line 1: column 'tokens' is no list of texts"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [true]}', (), "line 1: column 'tags' is no list of texts"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"]}', ("tokens", "ner"), "line 1: no column 'ner'"),
        ("a.jsonl", "[]", (), "line 1: not JSON"),
    ],
)
def test_mistakes_are_named_by_file_and_line(
    tmp_path: Path, name: str, text: str, columns: tuple[str, ...], message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BitlowerError) as caught:
        read_tagged(path, columns)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "two columns" in message
