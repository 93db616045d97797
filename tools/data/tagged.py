"""Words with tags: CoNLL files (a word and its tag a line, sentences end at empty lines), JSON lines with two lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitlower.ir import BitlowerError, nearest, shorten
from bitlower.tools.data.labels import class_of
from bitlower.tools.data.lines import read_lines
from bitlower.tools.data.tables import Row, read_objects

_WORDS, _TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels")
_DOCUMENT = "-DOCSTART-"
"""The word that begins a document in the files of CoNLL-2003; it is none of the text."""


@dataclass(frozen=True)
class TaggedSentence:
    """The words of a sentence, the tag of each as the file has it, and the line that each stands on (from 1)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    lines: tuple[int, ...]

    def tag_ids(self, path: Path, names: Mapping[str, int]) -> list[int]:
        """The class of each tag, which is one of ``names`` or its number.

        Raises:
            BitlowerError: a tag is none; the message names file and line.
        """
        rows = (Row(line, (tag,)) for line, tag in zip(self.lines, self.tags, strict=True))
        return [class_of(path, row, names, None) for row in rows]


def read_tagged(path: Path, columns: Sequence[str] = ()) -> list[TaggedSentence]:
    """The sentences of a file that have a word.

    Args:
        path: ``.jsonl``, or a CoNLL file under any other name, its columns parted by tabs or spaces.
        columns: of words and of tags: keys of the objects (``tokens`` or ``words``, and ``ner_tags``, ``tags`` or
            ``labels`` if none are named), or numbers from 0 (the first and the last column).

    Raises:
        BitlowerError: no such file or column, a line without a tag, lists of unequal length, or no sentence.
    """
    if len(columns) not in (0, 2):
        raise BitlowerError("token-classification takes two columns", hint="--columns words,tags")
    read = _json_sentences if path.suffix.lower() == ".jsonl" else _conll_sentences
    sentences = [sentence for sentence in read(path, columns) if sentence.words]
    if not sentences:
        raise BitlowerError(f"{path} holds no sentences", hint="one word and its tag a line, or JSON lines")
    return sentences


def _json_sentences(path: Path, columns: Sequence[str]) -> Iterator[TaggedSentence]:
    for line, form in read_objects(path):
        words, tags = (_values(path, line, form, choices) for choices in (columns[:1] or _WORDS, columns[1:] or _TAGS))
        if len(words) != len(tags):
            raise BitlowerError(f"{path}, line {line}: {len(words)} words have {len(tags)} tags")
        yield TaggedSentence(words, tags, (line,) * len(words))


def _values(path: Path, line: int, form: Mapping[str, object], choices: Sequence[str]) -> tuple[str, ...]:
    """The list under the first of ``choices`` that an object has."""
    key = next((choice for choice in choices if choice in form), None)
    if key is None:
        named = " or ".join(map(repr, choices))
        raise BitlowerError(f"{path}, line {line}: no column {shorten(named)}", hint=nearest(choices[0], form))
    values = form[key]
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, str | int) for v in values):
        raise BitlowerError(f"{path}, line {line}: column {key!r} is no list of texts or whole numbers")
    return tuple(map(str, values))


def _conll_sentences(path: Path, columns: Sequence[str]) -> Iterator[TaggedSentence]:
    if not all(column.isdecimal() and len(column) < 10 for column in columns):
        raise BitlowerError(f"{path}: columns of a CoNLL file are numbers from 0", hint="--columns 0,3")
    places = [int(column) for column in columns] or [0, -1]
    entries: list[tuple[str, str, int]] = []
    for line, text in read_lines(path):
        cells = [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
        if not text.strip() or cells[0] == _DOCUMENT:
            yield _sentence(entries)
            entries = []
            continue
        if len(cells) <= max(1, *places):
            needed = f"column {max(places)} is asked for" if columns else "a word and its tag are needed"
            raise BitlowerError(f"{path}, line {line}: {len(cells)} columns, {needed}")
        entries.append((cells[places[0]], cells[places[1]], line))
    yield _sentence(entries)


def _sentence(entries: Sequence[tuple[str, str, int]]) -> TaggedSentence:
    words, tags, lines = zip(*entries, strict=True) if entries else ((), (), ())
    return TaggedSentence(words, tags, lines)
