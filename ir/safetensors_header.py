"""The header of a safetensors file, held to the file before anything is built on it.

The format: eight bytes with the header's size, a JSON object from names to dtype, shape and place, then the numbers
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlower.ir.diagnostics import shorten
from bitlower.ir.files import open_regular
from bitlower.ir.json_files import object_of, parse_json

LIMIT = 100_000_000
"""Bytes of a header, as the format has it."""
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64), **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6), "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header says it lies in the file, from byte ``first`` to before byte ``last``."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors file ``path`` by name.

    Raises:
        OSError: the file is missing or no regular file.
        ValueError: the header is damaged, or does not fit the file: a tensor lies outside of it, over another, or has
            another size than its shape and dtype say.
    """
    with open_regular(path) as file:
        length = file.seek(0, 2)
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(LIMIT, length - 8):
            raise ValueError(f"its header has {size} bytes, the file {length}")
        form = object_of(parse_json(file.read(size)))
    form.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + size) for name, entry in form.items()}
    _check_places(tensors, 8 + size, length)
    return tensors


def _tensor(name: str, entry: Any, start: int) -> StoredTensor:
    what = f"the tensor {shorten(repr(name))}"
    form: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    dtype: Any = form.get("dtype")
    shape: Any = form.get("shape")
    offsets: Any = form.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has no dtype, shape and two offsets")
    if dtype not in _BITS:
        raise ValueError(f"{what} has the unknown dtype {shorten(repr(dtype))}")
    first, last = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (last - first):
        raise ValueError(f"{what} has {last - first} bytes, which are not {dtype} of shape {shorten(str(shape))}")
    return StoredTensor(dtype, tuple(shape), start + first, start + last)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_places(tensors: Mapping[str, StoredTensor], start: int, length: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].first, item[1].last)):
        if tensor.first < end:
            raise ValueError(f"the tensor {shorten(repr(name))} lies over another")
        end = tensor.last
    if end > length:
        raise ValueError(f"its tensors end at byte {end}, the file at byte {length}")
