"""A content-addressed store of what passes gave, so that a pipeline killed at any moment goes on where it was.

``entries/`` holds a JSON file a pass: the program's document, the tensors by digest, the results, the rows that
observers recorded. ``tensors/`` holds each distinct tensor once. Every file is written whole or not at all, and
checked when it is read; what is damaged counts as missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from bitlower.ir import BitlowerError, Program
from bitlower.ir.document import encode
from bitlower.ir.files import read_checked, write_checked, write_whole
from bitlower.ir.serialize import decode
from bitlower.ir.storage import ALIGNMENT, is_mapped, map_safetensors, to_safetensors
from bitlower.ir.tensors import tensor_digest
from bitlower.passes._machinery.digest import digest_tensor, tensor_of
from bitlower.passes._machinery.results import Form


@dataclass
class Entry:
    """What one pass gave.

    Args:
        changed: whether it changed the program.
        program: the new program; None if it is the old one.
        results: what it left in the context, encoded.
        rows: what observers recorded about it, by their keys.
    """

    changed: bool
    program: Program | None = None
    results: Form = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stored:
    """An :class:`Entry` on disk; ``tensors`` holds digest and strides by name."""

    changed: bool
    document: str
    tensors: dict[str, tuple[str, list[int]]]
    results: Form
    rows: dict[str, Any]


class Cache:
    """The store in ``folder``, which is made when something is first put there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str, beside: Program | None = None) -> Entry | None:
        """What is stored under ``key``; None if it is missing, incomplete or damaged.

        Args:
            key: as it was put.
            beside: a program in memory: a tensor of the same name and contents is shared with it, and if its tensors
                lie in files, so do the entry's.
        """
        path = self._entry_path(key)
        try:
            stored = _Stored(**json.loads(read_checked(path)))
            program = self._load(stored, beside) if stored.changed else None
            os.utime(path)
            return Entry(stored.changed, program, stored.results, stored.rows)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, BitlowerError):
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Store ``entry``: tensors first, then the file that names them.

        Raises:
            BitlowerError: the folder cannot be written to, or the disk is full.
        """
        try:
            document, tensors = encode(entry.program) if entry.program else ("", {})
            stored = _Stored(
                entry.changed,
                document,
                {name: self._store_tensor(entry.program, name) for name in tensors} if entry.program else {},
                entry.results,
                entry.rows,
            )
            self._write(key, stored)
        except OSError as error:
            raise self._unwritable(error) from error

    def put_rows(self, key: str, entry: Entry) -> None:
        """Store the rows of ``entry``, which is under ``key`` without them; all of it if it has gone or is damaged.

        Raises:
            BitlowerError: the folder cannot be written to, or the disk is full.
        """
        try:
            stored = replace(_Stored(**json.loads(read_checked(self._entry_path(key)))), rows=entry.rows)
        except (OSError, ValueError, TypeError):
            self.put(key, entry)
            return
        try:
            self._write(key, stored)
        except OSError as error:
            raise self._unwritable(error) from error

    def uses(self, key: str) -> frozenset[str]:
        """Which parts of the context the pass behind ``key`` was seen to read; empty if it never ran."""
        try:
            return frozenset(json.loads(read_checked(self._uses_path(key))))
        except (OSError, ValueError):
            return frozenset()

    def note_uses(self, key: str, parts: frozenset[str]) -> frozenset[str]:
        """Add ``parts`` to what is known of ``key``, and give all of it.

        Raises:
            BitlowerError: the folder cannot be written to, or the disk is full.
        """
        known = self.uses(key) | parts
        try:
            write_checked(self._uses_path(key), json.dumps(sorted(known)).encode())
        except OSError as error:
            raise self._unwritable(error) from error
        return known

    def prune(self, max_bytes: int) -> int:
        """Remove the entries that were used longest ago until all fits into ``max_bytes``; give the bytes freed.

        Tensors that no entry names, unfinished files and checkpoints inside passes, left by a killed run, go too.
        Not to be called while another process writes to the folder.
        """
        entries = sorted(self.folder.glob("entries/*/*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        needs = {path: _tensors_of(path) for path in entries}
        owners = Counter(digest for digests in needs.values() for digest in digests)
        sizes = {path.stem: path.stat().st_size for path in self.folder.glob("tensors/*/*.safetensors")}
        total = sum(path.stat().st_size for path in entries)
        total += sum(size for digest, size in sizes.items() if owners[digest])
        freed = 0
        for path in entries:
            if total <= max_bytes:
                break
            owners.subtract(needs[path])
            gone = path.stat().st_size
            total -= gone + sum(sizes.get(digest, 0) for digest in needs[path] if not owners[digest])
            freed += gone
            path.unlink()
        for digest, size in sizes.items():
            if not owners[digest]:
                self._tensor_path(digest).unlink(missing_ok=True)
                freed += size
        for path in (*self.folder.glob("*/*/.*"), *self.folder.glob("work/*/*")):
            freed += path.stat().st_size
            path.unlink()
        return freed

    def _write(self, key: str, stored: _Stored) -> None:
        write_checked(self._entry_path(key), json.dumps(asdict(stored)).encode())

    def _entry_path(self, key: str) -> Path:
        return self.folder / "entries" / key[:2] / f"{key}.json"

    def _uses_path(self, key: str) -> Path:
        return self.folder / "uses" / key[:2] / f"{key}.json"

    def _tensor_path(self, digest: str) -> Path:
        return self.folder / "tensors" / digest[:2] / f"{digest}.safetensors"

    def _unwritable(self, error: OSError) -> BitlowerError:
        return BitlowerError(
            f"the cache {self.folder} cannot be written ({error.strerror or error})",
            hint="free some space, choose another folder, or run without the cache",
        )

    def _store_tensor(self, program: Program, name: str) -> tuple[str, list[int]]:
        tensor = tensor_of(program, name)
        digest = digest_tensor(tensor)
        path = self._tensor_path(digest)
        if not path.exists():
            write_whole(path, to_safetensors("tensor", tensor.detach()))
        return digest, list(tensor.stride())

    def _load(self, stored: _Stored, beside: Program | None) -> Program:
        """The program with its tensors laid out as they were; damaged tensors are removed."""
        loaded = dict(beside.tensors()) if beside else {}
        mapped = any(map(is_mapped, loaded.values()))
        tensors: dict[str, torch.Tensor] = {}
        damaged: list[str] = []
        for name, (digest, strides) in stored.tensors.items():
            if name in loaded and (digest_tensor(loaded[name]), list(loaded[name].stride())) == (digest, strides):
                tensors[name] = loaded[name].detach()
                continue
            try:
                tensors[name] = self._load_tensor(digest, strides, mapped=mapped)
            except (OSError, ValueError, KeyError, SafetensorError, BitlowerError):
                self._tensor_path(digest).unlink(missing_ok=True)
                damaged.append(name)
        if damaged:
            raise ValueError(f"damaged in the cache: {', '.join(damaged)}")
        return decode(stored.document, tensors)

    def _load_tensor(self, digest: str, strides: list[int], *, mapped: bool) -> torch.Tensor:
        """The tensor in memory of its own, or in its file, at an address that torch could give it."""
        path = self._tensor_path(digest)
        loaded = map_safetensors(path)["tensor"] if mapped else safetensors.load(path.read_bytes())["tensor"]
        if tensor_digest(loaded) != digest:
            raise ValueError(f"the tensor {digest} is damaged")
        if list(loaded.stride()) != strides and 0 not in strides:
            return torch.empty_strided(loaded.shape, strides, dtype=loaded.dtype).copy_(loaded)
        return loaded if mapped and loaded.data_ptr() % ALIGNMENT == 0 else loaded.clone()


def aligned(program: Program) -> Program:
    """``program`` with every tensor at an address that torch would give it.

    Matrix kernels may round differently on memory that is mapped from a file at an odd address, and a program that
    comes out of the cache is not; with this, both give the same bits.
    """
    odd = [name for name, tensor in program.tensors() if tensor.data_ptr() % ALIGNMENT]
    if not odd:
        return program
    document, tensors = encode(program)
    copies = {name: t.clone(memory_format=torch.preserve_format) for name, t in tensors.items()}
    return decode(document, copies)


def _tensors_of(path: Path) -> frozenset[str]:
    """The digests that an entry names; none if it is damaged."""
    try:
        return frozenset(digest for digest, _ in _Stored(**json.loads(read_checked(path))).tensors.values())
    except (OSError, ValueError, TypeError):
        return frozenset()
