"""Sound and picture files that data files name: looked at before a model is loaded, so that a bad one costs no work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bitlower.frontends.pictures import picture_package, read_picture
from bitlower.frontends.sound import check_sound, sound_packages
from bitlower.frontends.task import is_caption_model, is_speech_reader
from bitlower.ir import BitlowerError
from bitlower.tools.data.texts import Column, Row, Text, read_examples


class FileKind(NamedTuple):
    """Files that the first column of a table may name.

    Args:
        look: raises a BitlowerError where a file is missing or none of them.
        packages: raises one where what reads them is not installed.
        captioned: whether each needs a text beside it.
    """

    look: Callable[[Path], object]
    packages: Callable[[], object]
    captioned: bool = False


SOUNDS = FileKind(check_sound, sound_packages)
CAPTIONED = FileKind(read_picture, picture_package, captioned=True)


def files_of(model: str | os.PathLike[str] | torch.nn.Module, task: str | None) -> FileKind | None:
    """The files that the data of ``model`` name; None where they are texts, or pictures without any."""
    if is_caption_model(model, task):
        return CAPTIONED
    return SOUNDS if is_speech_reader(model, task) else None


@dataclass(frozen=True)
class NamedRows:
    """Rows that a run reads: ``path`` is their file, or says what they are; ``read`` gives them anew."""

    path: Path
    read: Callable[[], Iterable[Row]]

    @classmethod
    def of_texts(cls, path: Path, column: Column, texts: Sequence[Text]) -> NamedRows:
        """The rows of the file ``path`` whose first text is one of ``texts``."""
        first = {text if isinstance(text, str) else text[0] for text in texts}
        return cls(path, lambda: (row for row in read_examples(path, column, None) if row.values[0] in first))

    @classmethod
    def of_caller(cls, texts: Sequence[Text]) -> NamedRows:
        """The texts of a caller; paths among them are relative to the current folder."""
        rows = [Row(place, (text,) if isinstance(text, str) else text) for place, text in enumerate(texts, 1)]
        return cls(Path("the calibration data"), lambda: rows)

    def check(self, kind: FileKind) -> None:
        """See that the first value of each row names a file of this kind, relative to the folder of ``path``.

        Raises:
            BitlowerError: a file is missing or cannot be read (with the row), a text is missing, or what reads such
                files is not installed.
        """
        kind.packages()
        for row in self.read():
            if kind.captioned and len(row.values) < 2:
                raise BitlowerError(
                    f"{self.path}, line {row.line}: there is a picture without a text, and the model reads both",
                    hint=f"name both: {self.path.name}:PICTURE,TEXT",
                )
            try:
                kind.look(self.path.parent / row.values[0])
            except BitlowerError as error:
                raise BitlowerError(f"{self.path}, line {row.line}: {error.message}", hint=error.hint) from None
