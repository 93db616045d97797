"""The header of a GGUF file, held to the file before a library walks through it.

The layout: magic, version, counts; keys with values; names, shapes, types and places of the tensors; the numbers
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A library that trusts a count of 2^60 loops for ever.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitlower.ir import shorten
from bitlower.ir.files import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
"""Of the format; version 1 has lengths of 32 bits."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
"""Types of values, by the numbers of the format."""
_LONGEST_ARRAY = 4_000_000
"""Entries; the largest vocabularies have a quarter of a million, merges as many."""
_DIMENSIONS = 4
"""The most that the format allows."""
_ALIGNMENT = 32
"""What the format says where a file says nothing."""


class NotGgufError(ValueError):
    """The file does not begin as a GGUF file does."""


@dataclass(frozen=True)
class GgufArray:
    """An array of the header.

    Args:
        place: of its first byte in the file.
        size: of all of it, in bytes.
        kind: of its entries, by the numbers of the format.
        entries: numbers, or texts as they lie in the file.
    """

    place: int
    size: int
    kind: int
    entries: Sequence[Any]


@dataclass(frozen=True)
class GgufHeader:
    """The single values by key, the arrays too, and the shapes of the tensors, as PyTorch orders them."""

    values: Mapping[str, Any]
    arrays: Mapping[str, GgufArray]
    shapes: Mapping[str, tuple[int, ...]]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file ``path``.

    Raises:
        OSError: the file is missing or no regular file.
        ValueError: it is no GGUF file, or its header does not fit it: a count, a length or a tensor runs past the end.
    """
    with open_regular(path) as file:
        return _Reader(file).header()


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = file.seek(0, 2)
        self._order = "<"
        file.seek(0)

    def header(self) -> GgufHeader:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise NotGgufError("it is no GGUF file")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and 2 and 3 are known")
        tensors, pairs = self._count("Q", 24), self._count("Q", 13)
        values: dict[str, Any] = {}
        arrays: dict[str, GgufArray] = {}
        for _ in range(pairs):
            key, kind = self._text(), self._number("I")
            if key in values or key in arrays:
                raise ValueError(f"it has the key {shorten(repr(key))} twice")
            if kind == _ARRAY:
                arrays[key] = self._array()
            else:
                values[key] = self._value(kind)
        places = [self._tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, which is no power of two")
        start = -(-self._file.tell() // alignment) * alignment
        for name, _, first, size in places:
            if start + first + size > self._length:
                raise ValueError(f"the tensor {shorten(repr(name))} runs past the end of the file")
        return GgufHeader(values, arrays, {name: shape for name, shape, _, _ in places})

    def _take(self, size: int) -> bytes:
        if size > self._length - self._file.tell():
            raise ValueError(f"something of {size} bytes at byte {self._file.tell()} runs past its end")
        return self._file.read(size)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(self._order + code, self._take(struct.calcsize(f"={code}")))
        return value

    def _count(self, code: str, least: int) -> int:
        """A count of things that take ``least`` bytes each at least."""
        count = int(self._number(code))
        if count * least > self._length:
            raise ValueError(f"it counts {count} entries in {self._length} bytes")
        return count

    def _text(self) -> str:
        return self._take(self._count("Q", 1)).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _array(self) -> GgufArray:
        place = self._file.tell()
        kind = self._number("I")
        count = self._count("Q", 1)
        if count > _LONGEST_ARRAY:
            raise ValueError(f"an array has {count} entries")
        entries: Sequence[Any]
        if kind == _STRING:
            entries = self._texts(count)
        elif kind in _SCALARS:
            form = f"{self._order}{count}{_SCALARS[kind]}"
            entries = struct.unpack(form, self._take(struct.calcsize(form)))
        else:
            raise ValueError(f"an array has entries of the unknown type {kind}")
        return GgufArray(place, self._file.tell() - place, kind, entries)

    def _texts(self, count: int) -> list[bytes]:
        """So many texts, each behind its length; a vocabulary is long, so where the file stands is not asked of it."""
        read, length = self._file.read, struct.Struct(f"{self._order}Q")
        texts, left = [], self._length - self._file.tell()
        for _ in range(count):
            left -= length.size
            (size,) = length.unpack(read(length.size)) if left >= 0 else (length.size,)
            left -= size
            if left < 0:
                raise ValueError(f"a text of {size} bytes at byte {self._file.tell()} runs past its end")
            texts.append(read(size))
        return texts

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text()
        rank = self._number("I")
        if rank > _DIMENSIONS:
            raise ValueError(f"the tensor {shorten(repr(name))} has {rank} dimensions")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        kind = self._number("I")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"the tensor {shorten(repr(name))} has the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return name, shape, self._number("Q"), math.prod(shape) * size // block
