"""How a backend's comparison is kept beside an artifact: ``verification.json``, read back with all its figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.artifact.schema import parsed

FILE = "verification.json"


class Verified(ABC):
    """A frozen dataclass of what was compared; its fields say what the file holds."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, floats with six significant digits; the inverse of :meth:`from_dict`."""

    @abstractmethod
    def headline(self) -> dict[str, Any]:
        """What a person asks first: ``runtime`` in words (empty: it was not run), and figures by name.

        A pair is ``[found, expected]``. What figures mean says ``bitlower.tools.verdict``.
        """

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Self:
        """The verification of plain data.

        Raises:
            CheckError: a figure is missing, or is something else; it is named.
        """
        return parsed(cls, form, FILE)

    def write(self, folder: Path) -> None:
        """Write ``verification.json`` into ``folder``."""
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What :meth:`write` wrote.

        Raises:
            CheckError: the file is missing or damaged.
        """
        return cls.from_dict(read_json(folder / FILE))
