"""What passes train on: rows, labels and windows against the files and transformers' own tokenizer."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.passes._machinery.digest import digest_batches
from bitlower.tools.data.texts import Row
from bitlower.tools.data.training import split_examples
from bitlower.tools.recipes.recipe import TrainingSection

_MADE = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
save_bert, sentences = _MADE["save_bert"], _MADE["sentences"]
_CASES = runpy.run_path(str(Path(__file__).parents[1] / "training_cases.py"))
rows, made, lines, table = (_CASES[name] for name in ("rows", "made", "lines", "table"))


@pytest.fixture(scope="session")
def classifier_program(classifier: Path) -> Program:
    return load(str(classifier))


@pytest.fixture(scope="session")
def tokenizer(classifier: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(classifier)


def test_rows_of_a_table_become_batches_with_their_labels(
    classifier_program: Program, tokenizer: Any, table: Callable[..., Path]
) -> None:
    whole = rows(80)
    data = made(classifier_program, {"data": str(table(whole)), "label": "label"})
    expected = [(tuple(tokenizer(text)["input_ids"]), int(label)) for text, _, label in whole]
    training, held_out = lines(data.training, "labels"), lines(data.held_out, "labels")
    assert sorted(training + held_out) == sorted(expected)
    assert (len(training), len(held_out)) == (72, 8)
    assert [len(batch["labels"]) for batch in data.training] == [32, 32, 8]
    assert all(batch["labels"].dtype == torch.int64 for batch in data.training)
    assert all(bool(batch["attention_mask"].any(0).all()) for batch in data.training)  # padded to the longest only
    assert all(len(batch["labels"].unique()) == 2 for batch in data.training[:2])  # although the file is sorted
    assert held_out == sorted(held_out, key=expected.index)


def test_the_drawing_is_by_seed_alone(classifier_program: Program, table: Callable[..., Path]) -> None:
    section = {"data": str(table(rows(60))), "label": "label", "samples": 20, "held_out": 0.2}
    first, again = (made(classifier_program, section) for _ in range(2))
    assert digest_batches(first.training) == digest_batches(again.training)
    assert digest_batches(first.held_out) == digest_batches(again.held_out)
    assert (len(lines(first.training)), len(lines(first.held_out))) == (20, 5)
    assert not set(lines(first.training)) & set(lines(first.held_out))
    other = made(classifier_program, section | {"seed": 1})
    assert set(lines(other.training)) != set(lines(first.training))


def test_held_out_rows_may_come_from_another_file(classifier_program: Program, table: Callable[..., Path]) -> None:
    other = rows(7, seed=5)
    section = {"data": str(table(rows(40))), "held_out": str(table(other, "dev.tsv")), "label": "label"}
    data = made(classifier_program, section | {"batch_size": 4, "max_length": 6})
    assert (len(lines(data.training)), len(data.training)) == (40, 10)
    assert [label for _, label in lines(data.held_out, "labels")] == [int(label) for *_, label in other]
    assert max(batch["input_ids"].shape[1] for batch in [*data.training, *data.held_out]) == 6


def test_pairs_are_tokenized_together(classifier_program: Program, tokenizer: Any, table: Callable[..., Path]) -> None:
    whole = rows(12)
    data = made(classifier_program, {"data": str(table(whole)), "column": ["other", "sentence"], "label": "label"})
    found = [
        (ids, batch["token_type_ids"][place].tolist()[: len(ids)], batch["labels"][place].item())
        for batch in [*data.training, *data.held_out]
        for place, (ids,) in enumerate(lines([batch]))
    ]
    pairs = [(tokenizer(b, a), int(label)) for a, b, label in whole]
    expected = [(tuple(pair["input_ids"]), pair["token_type_ids"], label) for pair, label in pairs]
    assert sorted(found) == sorted(expected)
    assert any(1 in kinds for _, kinds, _ in found)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_classes_go_by_their_names(classifier_program: Program, tmp_path: Path, kind: str) -> None:
    classifier_program = classifier_program.clone()
    classifier_program.config["id2label"] = {"0": "sad", "1": "glad"}
    path = tmp_path / f"train.{kind}"
    whole = [(text, label) for text, label in zip(sentences(10), ["glad", "sad", "1", "0", "glad"] * 2, strict=True)]
    forms = {
        "csv": ["text,mood", *(f'"{text}",{label}' for text, label in whole)],
        "jsonl": [json.dumps({"text": text, "mood": int(label) if label in "01" else label}) for text, label in whole],
    }
    path.write_text("\n".join(forms[kind]) + "\n")
    data = made(classifier_program, {"data": str(path), "label": "mood", "samples": 9})
    classes = {"sad": 0, "glad": 1, "0": 0, "1": 1}
    found = [label for _, label in lines([*data.training, *data.held_out], "labels")]
    assert sorted(found) == sorted(classes[label] for _, label in whole)


def test_a_model_with_one_output_has_values(tmp_path: Path, table: Callable[..., Path]) -> None:
    program = load(str(save_bert(tmp_path / "one", labels=1)))
    values = [0.25 * i for i in range(12)]
    whole = [(a, b, f" {value}") for (a, b, _), value in zip(rows(12), values, strict=True)]
    data = made(program, {"data": str(table(whole)), "label": "label"})
    assert {batch["labels"].dtype for batch in [*data.training, *data.held_out]} == {torch.float32}
    assert sorted(label for _, label in lines([*data.training, *data.held_out], "labels")) == values
    with pytest.raises(BitlowerError, match=r"train\.tsv, line 3: 'nan' is not a finite number"):
        made(program, {"data": str(table([("a", "b", "1"), ("a", "b", "nan")])), "label": "label"})


@given(st.integers(2, 400), st.integers(1, 300) | st.none(), st.floats(0.01, 0.9) | st.none(), st.integers(0, 3))
def test_no_row_is_lost_or_taken_twice(found: int, samples: int | None, share: float | None, seed: int) -> None:
    section = TrainingSection(data="x", samples=samples, held_out=share, seed=seed)
    whole = [Row(line, (f"text {line}",)) for line in range(1, found + 1)]
    part = share or 0.1
    count = found * part if samples is None else samples * part / (1 - part)
    held_out = max(1, round(count))
    if found < (samples or 1) + held_out and (samples is not None or found < 2):
        with pytest.raises(BitlowerError, match=f"x is too short: {found} texts, {(samples or 1) + held_out} are"):
            split_examples(Path("x"), whole, section)
        return
    training, left = split_examples(Path("x"), whole, section)
    assert len(left.rows) == held_out
    assert len(training.rows) == (samples or found - held_out)
    assert len({row.line for row in (*training.rows, *left.rows)}) == len(training.rows) + held_out
    assert list(left.rows) == sorted(left.rows, key=lambda row: row.line)


@pytest.mark.parametrize(("share", "held_out"), [(None, 512), (0.25, 1500)])
def test_no_more_than_some_are_held_out_unless_asked_for(share: float | None, held_out: int) -> None:
    whole = [Row(line, ("text",)) for line in range(1, 6001)]
    for samples in (None, 6000 - held_out):
        section = TrainingSection(data="x", held_out=share, samples=samples)
        assert [len(part.rows) for part in split_examples(Path("x"), whole, section)] == [6000 - held_out, held_out]


@pytest.mark.parametrize("bos", ["never", "always"])
def test_windows_of_a_long_text(llama_program: Program, llama: Path, story: Path, bos: str) -> None:
    from transformers import AutoTokenizer

    section = {"data": str(story), "max_length": 16, "batch_size": 4, "held_out": 0.25}
    data = made(llama_program, section, decoder=True, bos=bos)
    tokens = AutoTokenizer.from_pretrained(llama)(story.read_text(), add_special_tokens=False)["input_ids"]
    room = 15 if bos == "always" else 16
    start = (0,) if bos == "always" else ()
    expected = [(*start, *tokens[i : i + room]) for i in range(0, len(tokens) - room + 1, room)]
    training, held_out = ([ids for (ids,) in lines(part)] for part in (data.training, data.held_out))
    assert sorted(training + held_out) == sorted(expected)
    assert len(held_out) == round(len(expected) / 4)
    assert training != sorted(training, key=expected.index)
    assert data.lead == start
    assert [len(batch["input_ids"]) for batch in data.training[:-1]] == [4] * (len(data.training) - 1)
    assert "labels" not in data.training[0]


def test_windows_of_two_texts(llama_program: Program, story: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("snow " * 50)
    section = {"data": str(story), "held_out": str(tmp_path / "other.txt"), "max_length": 16, "samples": 3}
    data = made(llama_program, section, decoder=True)
    assert [tuple(batch["input_ids"].shape) for batch in data.training] == [(1, 16)] * 3
    assert [tuple(batch["input_ids"].shape) for batch in data.held_out] == [(1, 16)] * 3
    assert {len(batch["input_ids"].unique()) for batch in data.held_out} == {1}


@pytest.mark.parametrize(
    ("content", "section", "message"),
    [
        ("a cat\t7", {"label": "label"}, "train.tsv, line 22: '7' is no label; labels are numbers from 0 to 1, or"),
        ("a cat\tgood", {"label": "label"}, "line 22: 'good' is no label; "),
        ("a cat\t0.5", {"label": "label"}, "line 22: '0.5' is no label; "),
        ("a cat\t", {"label": "label"}, "line 22: '' is no label; "),
        ("a cat\t²", {"label": "label"}, "line 22: '²' is no label; "),
        (" \t1", {"label": "label"}, "train.tsv, line 22: the text is empty; write one, or drop the line"),
        (" \tb", {"column": ["sentence", "label"]}, "line 22: the text is empty"),
        ("a cat", {"label": "label"}, "line 22: 1 columns, column 1 is asked for"),
        ("a cat\t1", {"label": "lable"}, "train.tsv has no column 'lable'; did you mean 'label'?"),
        ("a cat\t1", {"column": ["sentence", "second"]}, "train.tsv has no column 'second'"),
        ("a cat\t1", {"samples": 40}, "train.tsv is too short: 21 texts, 44 are needed"),
        ("a cat\t1", {"held_out": "none.tsv"}, "cannot read the data file none.tsv"),
    ],
)
def test_mistakes_name_the_file_and_the_line(
    classifier_program: Program, tmp_path: Path, content: str, section: dict[str, Any], message: str
) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "a cat sings\t1\n" * 20 + f"{content}\n")
    with pytest.raises(BitlowerError) as caught:
        made(classifier_program, {"data": str(path), **section})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_texts_alone_are_left_out(classifier_program: Program, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("a cat\n\n  \na dog sings\n")
    data = made(classifier_program, {"data": str(path)})
    assert (len(lines(data.training)), len(lines(data.held_out))) == (1, 1)
    path.write_text("\n\n")
    with pytest.raises(BitlowerError, match="too short: 0 texts"):
        made(classifier_program, {"data": str(path)})
    with pytest.raises(BitlowerError, match=r"train\.txt has no columns"):
        made(classifier_program, {"data": str(path), "label": "label"})


def test_labels_need_a_head_for_them(
    bert_program: Program, classifier_program: Program, table: Callable[..., Path]
) -> None:
    section = {"data": str(table(rows(10))), "label": "label"}
    with pytest.raises(BitlowerError, match=r"labels are for models with one row of logits .* last_hidden_state:"):
        made(bert_program, section)
    several = classifier_program.clone()
    several.config["problem_type"] = "multi_label_classification"
    with pytest.raises(BitlowerError, match="a text may have several labels"):
        made(several, section)


def test_short_texts_have_no_windows(llama_program: Program, story: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("snow " * 15)
    for changed, message in [
        ({"data": str(tmp_path / "short.txt")}, "the training text is too short: 15 tokens are 0 windows of 16, 2 are"),
        ({"held_out": str(tmp_path / "short.txt")}, "the held-out text is too short: 15 tokens are 0 windows"),
        ({"samples": 4000}, "the training text is too short: .* of 16, 4032 are needed"),
        ({"max_length": 4000}, "windows of 4000 tokens do not fit the model"),
    ]:
        with pytest.raises(BitlowerError, match=message):
            made(llama_program, {"data": str(story), "max_length": 16, **changed}, decoder=True)
