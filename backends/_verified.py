"""How a backend's comparison is kept beside an artefact: ``verification.json``, read back with all its figures."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from bitlower.backends._json import read_json, write_json
from bitlower.ir import CheckError

FILE = "verification.json"


class Verified(ABC):
    """A frozen dataclass of what was compared; a backend says what its fields are made of."""

    parts: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """What makes a field of its plain data; other fields are plain."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, floats with six significant digits; the inverse of :meth:`from_dict`."""

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Self:
        """The verification of plain data.

        Raises:
            CheckError: a figure is missing.
        """
        assert dataclasses.is_dataclass(cls)
        try:
            values = {field.name: form[field.name] for field in dataclasses.fields(cls)}
            values |= {name: make(form[name]) for name, make in cls.parts.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckError(f"{FILE} is damaged: {error}") from None
        return cls(**values)

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


def rows_of(kind: Callable[..., Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What makes a tuple of ``kind`` of a list of mappings."""
    return lambda rows: tuple(kind(**row) for row in rows)
