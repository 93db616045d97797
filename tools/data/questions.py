"""Questions about contexts, with their answers: SQuAD's JSON files (Rajpurkar et al., 2016 and 2018) and JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitlower.ir import BitlowerError, nearest
from bitlower.ir.files import reason
from bitlower.ir.json_files import read_json
from bitlower.tools.data.tables import read_objects

_KEYS = ("question", "context", "answers")
_LARGEST = 1 << 30
"""Bytes of a file that is read as a whole; the training part of SQuAD 2.0 has 42 million."""


@dataclass(frozen=True)
class Question:
    """A question, the text that it is about, and what counts as an answer; nothing where the text has none.

    ``where`` is its place in the file, for messages.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    where: str


def read_questions(path: Path, columns: Sequence[str] = ()) -> list[Question]:
    """The questions of a file.

    Args:
        path: ``.json`` as SQuAD has it (``data``, ``paragraphs``, ``qas``), or ``.jsonl``. Answers are texts, objects
            with a ``text``, or an object with a list ``text``.
        columns: of JSON lines, the keys of question, context and answers, if they are not called so.

    Raises:
        BitlowerError: no such file, another kind of file, or a question that lacks something; its place is named.
    """
    if len(columns) not in (0, 3) or (columns and path.suffix.lower() != ".jsonl"):
        raise BitlowerError(
            "question-answering takes three columns of a .jsonl file", hint="--columns question,context,answers"
        )
    entries: Iterator[tuple[str, Mapping[str, object]]]
    match path.suffix.lower():
        case ".jsonl":
            entries = ((f"line {line}", form) for line, form in read_objects(path))
        case ".json":
            entries = _squad_entries(path)
        case _:
            raise BitlowerError(f"{path} is neither .json nor .jsonl", hint="give a file of SQuAD, or JSON lines")
    questions = [_question(f"{path}, {place}", form, columns or _KEYS) for place, form in entries]
    if not questions:
        raise BitlowerError(f"{path} holds no questions")
    return questions


def _squad_entries(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each question with its context; entries of ``data`` without paragraphs are questions themselves."""
    try:
        form = read_json(path, limit=_LARGEST)
    except (OSError, ValueError) as error:
        raise BitlowerError(f"cannot read the data file {path}: {reason(error)}") from None
    for place, article in _objects(path, "", form, "data"):
        if "paragraphs" not in article:
            yield place, article
            continue
        for paragraph_place, paragraph in _objects(path, place, article, "paragraphs"):
            for question_place, question in _objects(path, paragraph_place, paragraph, "qas"):
                yield question_place, {"context": paragraph.get("context"), **question}


def _objects(
    path: Path, place: str, form: Mapping[str, object], key: str
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The objects in the list ``key`` of ``form``, with their places."""
    values, place = form.get(key), f"{place}.{key}" if place else key
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise BitlowerError(f"{path}: {place} is no list of objects", hint="SQuAD has data, paragraphs and qas")
    return ((f"{place}[{count}]", value) for count, value in enumerate(values))


def _question(where: str, form: Mapping[str, object], keys: Sequence[str]) -> Question:
    for key in keys:
        if form.get(key) is None:
            raise BitlowerError(f"{where}: no {key!r}", hint=nearest(key, form))
    question, context = (_text(where, key, form[key]) for key in keys[:2])
    return Question(question, context, _answers(where, keys[2], form[keys[2]]), where)


def _text(where: str, key: str, value: object) -> str:
    """A text that is not blank, as it is: answers are found by their place in it."""
    if not isinstance(value, str) or not value.strip():
        raise BitlowerError(f"{where}: {key!r} is no text, or empty")
    return value


def _answers(where: str, key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, dict):
        value = value.get("text")
    values = value if isinstance(value, list) else [value]
    texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in values]
    if not all(isinstance(text, str) for text in texts):
        raise BitlowerError(f"{where}: {key!r} holds something else than texts", hint='write [{"text": "…"}] or ["…"]')
    return tuple(str(text) for text in texts if str(text).strip())
