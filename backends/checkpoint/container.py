"""What holds the tensors of a checkpoint: files that are written tensor by tensor, and read one tensor at a time."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        name: in the file.
        dtype: of the tensor.
        shape: of the tensor.
        make: returns it when its turn comes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """The tensors of a folder by name."""

    @property
    def names(self) -> set[str]:
        """Of all tensors."""

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, in the dtype and shape of its :class:`Entry`.

        Raises:
            CheckError: there is none of that name, or the file is damaged.
        """


class Container(abc.ABC):
    """A kind of file, under names of the Hugging Face model; one that has others maps them both ways."""

    files: ClassVar[tuple[str, ...]] = ()
    """The names of its files in the folder, as far as they are always the same: no file of the model may bear them."""
    readers: ClassVar[tuple[str, ...]] = ()
    """What transformers needs to read it, by the names that these modules are imported by."""

    @abc.abstractmethod
    def write(self, entries: Sequence[Entry], folder: Path, *, max_shard_size: int) -> list[str]:
        """Write the tensors into ``folder``, each made when its turn comes; the names of the files.

        Args:
            entries: with unique names.
            folder: exists. The files appear in it whole, or not at all.
            max_shard_size: bytes of a file, at most; a single tensor may be larger.

        Raises:
            CheckError: what an entry made has not its dtype and shape.
        """

    @abc.abstractmethod
    def open(self, folder: Path) -> Tensors:
        """What was written into ``folder``.

        Raises:
            CheckError: a file is missing or damaged.
        """
