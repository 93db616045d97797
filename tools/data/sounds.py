"""Sound files that data files name: looked at before a model is loaded, so that a bad one costs no work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitlower.frontends.sound import check_sound, sound_packages
from bitlower.ir import BitlowerError
from bitlower.tools.data.texts import Column, Row, Text, read_examples


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

    def check_sounds(self) -> None:
        """See that the first value of each row names a sound file, relative to the folder of ``path``.

        Raises:
            BitlowerError: a file is missing, no sound or empty (with the row), or what reads sound is not installed.
        """
        sound_packages()
        for row in self.read():
            try:
                check_sound(self.path.parent / row.values[0])
            except BitlowerError as error:
                raise BitlowerError(f"{self.path}, line {row.line}: {error.message}", hint=error.hint) from None
