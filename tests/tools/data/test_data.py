"""Reading texts and columns; every mistake names the file and the place."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.tools.data.lines import LONGEST
from bitlower.tools.data.texts import (
    check_finite,
    number,
    read_rows,
    read_text,
    read_texts,
    split_texts,
    split_windows,
)

PRINTABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufeff"), min_size=1)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def columns(path: Path, *names: str) -> list[tuple[str, ...]]:
    return [row.values for row in read_rows(path, names)]


def test_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\n  two \nthree")
    assert read_texts(path) == ["one", "two", "three"]


def test_columns_by_name_and_by_number(tmp_path: Path) -> None:
    tsv = write(tmp_path / "a.tsv", 'text\tlabel\n"quoted\t1\nb"\t0\n')
    assert read_texts(f"{tsv}:text") == ['"quoted', 'b"']  # as GLUE: quotes mean nothing
    assert read_texts(tsv) == read_texts(tsv, column="text")
    assert columns(tsv, "label", "text") == [("1", '"quoted'), ("0", 'b"')]
    headless = write(tmp_path / "b.tsv", "x\t0.5\ny\t1\n")
    assert columns(headless, "1", "0") == [("0.5", "x"), ("1", "y")]
    quoted = write(tmp_path / "c.csv", 'text,label\n"a, ""b""",1\n')
    assert columns(quoted, "text", "label") == [('a, "b"', "1")]
    lines = write(tmp_path / "d.jsonl", '{"text": "a", "n": 1}\n\n{"text": "b", "n": 2}\n')
    assert columns(lines, "n", "text") == [("1", "a"), ("2", "b")]
    assert read_texts(lines) == ["a", "b"]


@given(st.lists(st.lists(PRINTABLE, min_size=2, max_size=2), min_size=1, max_size=8))
def test_tables_agree_with_the_csv_module(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("tables")
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["first", "second"], *rows])
    expected = [tuple(row) for row in rows]
    assert columns(write(folder / "a.csv", buffer.getvalue()), "first", "second") == expected
    tsv = "".join(f"{a}\t{b}\n" for a, b in rows)
    assert columns(write(folder / "a.tsv", tsv), "0", "1") == expected
    objects = "".join(json.dumps({"first": a, "second": b}) + "\n" for a, b in rows)
    assert columns(write(folder / "a.jsonl", objects), "first", "second") == expected


def test_drawing_is_by_seed_and_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"text {i:03}\n" for i in range(200)))
    first = read_texts(path, samples=20, seed=1)
    assert first == read_texts(path, samples=20, seed=1) == sorted(first)
    assert len(set(first)) == 20
    assert first != read_texts(path, samples=20, seed=2)
    assert read_texts(path, samples=200) == read_texts(path)


def test_every_text_is_drawn_equally_often(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"{i}\n" for i in range(10)))
    counts = [0] * 10
    for seed in range(400):
        for text in read_texts(path, samples=3, seed=seed):
            counts[int(text)] += 1
    assert max(abs(count - 120) for count in counts) < 4 * (400 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize(
    ("available", "samples", "calibration", "held_out"),
    [
        (200, 100, 100, 16),
        (105, 100, 100, 5),
        (100, 100, 100, 0),
        (200, None, 128, 16),
        (80, None, 70, 10),
        (8, None, 7, 1),
    ],
)
def test_split_keeps_held_out_texts_apart(available: int, samples: int | None, calibration: int, held_out: int) -> None:
    whole = [f"text {i:03}" for i in range(available)]
    split = split_texts(whole, samples=samples, seed=3)
    assert (len(split.calibration), len(split.held_out)) == (calibration, held_out)
    assert not set(split.calibration) & set(split.held_out)
    assert list(split.calibration) == sorted(split.calibration)
    assert split == split_texts(whole, samples=samples, seed=3)


def test_one_long_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeff one \n\n two\r\nthree")
    assert read_text(path) == " one \n\n two\r\nthree"
    assert read_text(path, joiner="|") == " one || two|three"
    assert read_text(path, limit=5) == " one \n"
    rows = write(tmp_path / "a.jsonl", '{"text": " a\\n"}\n{"text": ""}\n{"text": "b"}\n')
    assert read_text(rows) == " a\n\n\n\n\nb"
    assert read_text(f"{rows}:text", joiner="") == " a\nb"
    assert read_text(rows, joiner="-", limit=2) == " a\n"
    with pytest.raises(BitlowerError, match="holds no text"):
        read_text(write(tmp_path / "b.txt", " \n\n"))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.integers(0, 30), st.integers(0, 9))
def test_windows_are_whole_apart_and_in_order(length: int, samples: int, held: int, spare: int, seed: int) -> None:
    ids = torch.arange(length * samples + spare)
    kept, held_out = split_windows(ids, length, samples, held_out=held, seed=seed)
    assert kept.shape == (samples, length)
    assert len(held_out) == min(held, spare // length)
    starts = torch.cat([kept, held_out])[:, 0]
    assert bool((starts % length == 0).all())
    assert len(set(starts.tolist())) == len(starts)
    for rows in (kept, held_out):
        assert bool((rows == rows[:, :1] + torch.arange(length)).all())
        assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist())
    assert torch.equal(kept, split_windows(ids, length, samples, seed=seed)[0]) or held
    assert torch.equal(kept, split_windows(ids, length, samples, held_out=held, seed=seed)[0])


def test_windows_come_from_all_of_the_text_and_must_be_enough() -> None:
    ids = torch.arange(1000)
    places = {int(i) // 10 for seed in range(60) for i in split_windows(ids, 10, 10, seed=seed)[0][:, 0]}
    assert len(places) == 100
    with pytest.raises(BitlowerError, match="1000 tokens are 100 windows of 10, 101 are needed"):
        split_windows(ids, 10, 101)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"", None, "a.txt holds no text"),
        ("a.txt", b" \n\n", None, "a.txt holds no text"),
        ("a.tsv", b"", None, "a.tsv holds no text"),
        ("a.txt", b"fine\nbad \xff\n", None, "a.txt, line 2: byte 4 is not UTF-8"),
        ("a.tsv", b"sentence\tlabel\nx\t1\n", "sentense", "no column 'sentense'; did you mean 'sentence'"),
        ("a.tsv", b"s1\ts2\nx\ty\n", None, "has several columns: s1, s2; name one"),
        ("a.tsv", b"text\tlabel\nx\n", "label", "line 2: 1 columns, column 1 is asked for"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "text", "line 2: not JSON"),
        ("a.jsonl", b'["a"]\n', "text", "line 1: not JSON: it holds a list, not a JSON object"),
        ("a.jsonl", b'{"txt": "a"}\n', "text", "no column 'text'; did you mean 'txt'"),
        ("a.jsonl", b'{"text": ["a"]}\n', "text", "column 'text' is no text and no number"),
        ("a.csv", b'text\n"open\n', "text", "line 2: unexpected end of data"),
        ("a.txt", b"one\ntwo\n", "text", "a.txt has no columns"),
    ],
)
def test_mistakes_name_the_place(tmp_path: Path, name: str, content: bytes, column: str | None, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BitlowerError) as caught:
        read_texts(path, column=column)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_and_too_few_texts(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match=r"cannot read the data file .*No such file"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(BitlowerError, match="is a folder"):
        read_texts(tmp_path)
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    with pytest.raises(BitlowerError, match=r"a.txt is too short: 2 texts, 3 are needed"):
        read_texts(path, samples=3)
    with pytest.raises(BitlowerError, match=r"a.txt is too short: 2 texts, 8 are needed"):
        split_texts(path, samples=None)
    with pytest.raises(BitlowerError, match="cannot draw 0 samples"):
        split_texts(path, samples=0)


def test_numbers_must_be_finite(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "score\n1.5\nnan\nx\n")
    rows = list(read_rows(path, ["score"]))
    assert number(path, rows[0], rows[0].values[0]) == 1.5
    for row in rows[1:]:
        with pytest.raises(BitlowerError, match=f"line {row.line}: .* is not a finite number"):
            number(path, row, row.values[0])


def test_batches_must_be_finite() -> None:
    good = {"ids": torch.ones(2, dtype=torch.int64), "x": torch.ones(2)}
    check_finite([good], "calibration")
    with pytest.raises(BitlowerError, match="calibration: the tensor 'x' of batch 1 holds NaN or Inf"):
        check_finite([good, good | {"x": torch.tensor([1.0, torch.inf])}], "calibration")


def test_only_regular_files_hold_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, kind in [(tmp_path / "pipe.txt", "a named pipe"), (Path("/dev/zero"), "a device")]:
        with pytest.raises(BitlowerError, match=f"cannot read the data file {path}: it is {kind}, not a file"):
            read_texts(path)
    with pytest.raises(BitlowerError, match="is no path: File name too long"):
        read_texts(f"{tmp_path}/{'a' * 5000}.tsv:text")


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.csv", "a.jsonl"])
def test_a_line_is_no_longer_than_a_text_may_be(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"text\n" + b"x" * (LONGEST + 1))
    with pytest.raises(BitlowerError, match=rf"{name}, line 2: more than {LONGEST} bytes|line 1: not JSON"):
        read_texts(path, column=None if name == "a.txt" else "text")


def test_a_long_text_without_line_breaks_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "\u00e4" * (LONGEST // 2) + "x\u20ac" * 1_000_000
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read_text(path) == text
    assert text.startswith(read_text(path, limit=10))
    path.write_bytes(b"x" * LONGEST + b"\xe2\x82")
    with pytest.raises(BitlowerError, match=r"line 1: byte \d+ is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\n".encode("utf-16"), "line 1: byte 0 is not UTF-8"),
        ("text\n".encode("utf-16-le"), "line 1: a null character; save the file as UTF-8 text"),
        (b"ok\na\0b\n", "line 2: a null character"),
        (b"ok\n\xe2\x82", "line 2: byte 0 is not UTF-8"),
        (b"\xef\xbb\xff", "line 1: byte 0 is not UTF-8"),
    ],
)
def test_bytes_that_are_no_utf8_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(BitlowerError, match=message):
        read_texts(path)


def test_columns_of_any_name_and_number_are_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("\t".join(f"c{n}" for n in range(50_000)) + "\n" + "\t".join("x" * 50_000) + "\n")
    for column in ("9" * 5000, "c" * 10**6):
        with pytest.raises(BitlowerError, match="has no column") as refusal:
            read_texts(path, column=column)
        assert len(str(refusal.value)) <= 2000
