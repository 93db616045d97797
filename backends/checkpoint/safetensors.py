"""safetensors files written tensor by tensor: the header, then each tensor as it is made, so that one is held.

The layout is that of the ``safetensors`` library: wide types first, so that every tensor is aligned. Files above a size
are split as Hugging Face does, with an index beside them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar

import torch

from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.checkpoint.container import Container, Entry
from bitlower.ir import BitlowerError, CheckError
from bitlower.ir.storage import StoredTensors

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(entries: Sequence[Entry], folder: Path, *, max_shard_size: int) -> list[str]:
    """Write ``entries`` into ``folder`` in files of at most ``max_shard_size`` bytes; the names of the files.

    The files appear together and whole: they are written in a folder of their own, flushed, and moved into place. A
    tensor that is larger than ``max_shard_size`` has a file of its own.
    """
    shards = _split(entries, max_shard_size)
    count = len(shards)
    names = [MODEL] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as scratch:
        for name, shard in zip(names, shards, strict=True):
            with (Path(scratch) / name).open("wb") as file:
                _write_file(file, shard)
        if count > 1:
            where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
            size = sum(entry.bytes for entry in entries)
            write_json(Path(scratch) / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
            names.append(INDEX)
        for name in names:
            (Path(scratch) / name).replace(folder / name)
    return names


def _split(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_file(file: BinaryIO, entries: Iterable[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    offset = 0
    for entry in ordered:
        end = offset + entry.bytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in ordered:
        tensor = entry.make()
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise CheckError(
                f"{entry.name} is {tensor.dtype}{list(tensor.shape)}, not {entry.dtype}{list(entry.shape)}"
            )
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
    os.fsync(file.fileno())


class TensorFolder:
    """The tensors of a folder, mapped: what is read of one can be let go of with ``ir.storage.release``.

    Raises:
        CheckError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, StoredTensors] = {}
        for name in self._file_names():
            try:
                stored = StoredTensors(folder / name)
            except BitlowerError as error:
                raise CheckError(error.message) from None
            self._files.update(dict.fromkeys(stored.names, stored))

    def _file_names(self) -> list[str]:
        if not (self._folder / INDEX).is_file():
            return [MODEL]
        listed = read_json(self._folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(n, str) and Path(n).name == n for n in listed.values()):
            raise CheckError(f"{INDEX} in {self._folder} is damaged: it does not say where the weights lie")
        return sorted(set(listed.values()))

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """One of them.

        Raises:
            CheckError: there is none of that name.
        """
        if name not in self._files:
            raise CheckError(f"the tensor {name} is missing in {self._folder}")
        try:
            return self._files[name].map(name)
        except BitlowerError as error:
            raise CheckError(error.message) from None


class Safetensors(Container):
    """The files that transformers writes: ``model.safetensors``, or several and an index."""

    files: ClassVar[tuple[str, ...]] = (MODEL, INDEX)

    def write(self, entries: Sequence[Entry], folder: Path, *, max_shard_size: int) -> list[str]:
        """See :func:`write_tensors`."""
        return write_tensors(entries, folder, max_shard_size=max_shard_size)

    def open(self, folder: Path) -> TensorFolder:
        """See :class:`TensorFolder`."""
        return TensorFolder(folder)
