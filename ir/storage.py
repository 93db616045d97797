"""Tensors that lie in files: mapped into memory, read when they are used, let go of when they are not.

A mapped tensor is an ordinary ``torch.Tensor``. Its pages come from the file when something reads them and count as
resident memory until :func:`release` gives them back, so a model far larger than memory can be walked through.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.files import open_regular, reason
from bitlower.ir.safetensors_header import StoredTensor, read_header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
ALIGNMENT = 64
"""Bytes of whose multiple torch makes the address of a tensor; matrix kernels may round otherwise elsewhere."""
_CHUNK = 1 << 22
"""Elements that are read or written at a time: 16 MB in float32 beside the tensor."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``, by the numbers of malloc.h."""
_KEPT = 3 << 20
"""Bytes of a block up to which a bound heap keeps it for the next one."""
_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Living maps by their address; a map lives as long as a tensor over it."""
_PRIVATE: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
"""Those whose file does not learn what is written to them."""


def map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name, mapped; what is written to them stays in memory.

    Raises:
        BitlowerError: the file is missing or damaged, or has a type that torch lacks.
    """
    return StoredTensors(path).map_all()


class StoredTensors:
    """The tensors of a safetensors file; its header is read once, however often they are mapped.

    Raises:
        BitlowerError: the file is missing or damaged, or has a type that torch lacks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._header = read_header(path)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        lacking = sorted({entry.dtype for entry in self._header.values()} - set(_DTYPES))
        if lacking:
            raise BitlowerError(f"{path} holds tensors of the dtype {lacking[0]}, which torch lacks")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the order of the header."""
        return tuple(self._header)

    def map(self, name: str) -> torch.Tensor:
        """The tensor ``name``, in a map of its own: what is read of it goes when it does.

        Raises:
            BitlowerError: the file is gone.
        """
        return _tensor(self._map(), self._header[name])

    def map_all(self) -> dict[str, torch.Tensor]:
        """All of them by name, in one map.

        Raises:
            BitlowerError: the file is gone.
        """
        base = self._map()
        return {name: _tensor(base, entry) for name, entry in self._header.items()}

    def _map(self) -> torch.Tensor:
        try:
            with open_regular(self._path) as file:
                map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(map_) < max((entry.last for entry in self._header.values()), default=0):
                raise ValueError("it is shorter than it was")
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        _PRIVATE.add(map_)
        return _base(map_)

    def _damaged(self, error: Exception) -> BitlowerError:
        return BitlowerError(f"{self._path} is damaged: {reason(error)}", hint="fetch the file again")


def to_safetensors(name: str, tensor: torch.Tensor) -> Iterator[memoryview]:
    """A safetensors file with ``tensor`` in it, in pieces: it is not copied whole, and a mapped one is let go of.

    The numbers begin at a multiple of 64 bytes. Where the file is mapped, they lie as if torch had allocated them.

    Args:
        name: of the tensor in the file.
        tensor: on any device and of any layout; it is stored contiguously.
    """
    entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    header = json.dumps({name: entry}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for part in parts(tensor.cpu().contiguous()):
        yield part.view(torch.uint8).numpy().data


def _tensor(base: torch.Tensor, entry: StoredTensor) -> torch.Tensor:
    dtype = _DTYPES[entry.dtype]
    raw = base[entry.first : entry.last]
    if not raw.numel() or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def spill(tensor: torch.Tensor, dtype: torch.dtype | None = None, folder: Path | None = None) -> torch.Tensor:
    """A mapped copy of ``tensor`` in a temporary file, which goes when the last tensor over it does.

    Args:
        tensor: on the CPU, of any layout; if it is mapped, its pages are given back on the way.
        dtype: of the copy; that of ``tensor`` if None.
        folder: for the file; the system's temporary folder if None.

    Raises:
        OSError: the disk is full.
    """
    copy = _empty(tensor.shape, dtype or tensor.dtype, folder)
    source, target = tensor.detach().contiguous().reshape(-1), copy.view(-1)
    for start in range(0, source.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        target[part] = source[part]
        release(source[part])
        release(target[part])
    return copy


def _empty(shape: torch.Size, dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """A mapped tensor of zeros in an unlinked file; its blocks are reserved, so that a full disk is an error here."""
    count = shape.numel() * dtype.itemsize
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    place = folder or Path(tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, count)
        except OSError as error:
            error.filename = str(place)
            raise
        base = _base(mmap.mmap(file.fileno(), count))
    return base.view(dtype).reshape(shape)


def _base(map_: mmap.mmap) -> torch.Tensor:
    base = torch.frombuffer(map_, dtype=torch.uint8)
    _MAPS[base.data_ptr()] = map_
    return base


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` lies in a file."""
    return _map_of(tensor) is not None


def settle(tensor: torch.Tensor, *, mapped: bool) -> torch.Tensor:
    """``tensor`` where a model's weights lie: in a file, or at an address that torch could give it."""
    if mapped:
        return tensor if is_mapped(tensor) else spill(tensor)
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def like(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """``tensor``, mapped if ``original`` is: what replaces a parameter lies where the parameter lay."""
    return spill(tensor) if is_mapped(original) else tensor


def release(tensor: torch.Tensor) -> None:
    """Give back the memory of a mapped tensor; the next reader takes it from the file again. Others are left alone.

    A tensor over a model's file that was written to keeps its pages: the file does not know them.
    """
    map_ = _map_of(tensor)
    if map_ is None or (tensor._version and map_ in _PRIVATE):
        return
    start = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    map_.madvise(mmap.MADV_DONTNEED, first, start + size * tensor.element_size() - first)


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The entries of ``tensor``, in order, in flat parts; those of a mapped one are let go of after use."""
    for part in torch.split(tensor.detach().reshape(-1), _CHUNK):
        yield part
        release(part)


def bound_heap() -> None:
    """From now on, blocks above 3 MB go back to the system when they are freed (glibc), whatever came before.

    By itself the C library raises that bound to 32 MB as blocks are freed, and keeps what is below it: the matrices of
    a layer then leave holes as large as themselves. A lower bound makes arithmetic on tensors of one or two megabytes
    many times slower: each result comes from the system page by page.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _KEPT)
        set_option(_M_TRIM_THRESHOLD, 3 * _KEPT)  # an operand and a result come and go without it


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it for later (glibc)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _map_of(tensor: torch.Tensor) -> mmap.mmap | None:
    if tensor.device.type != "cpu" or not _MAPS:
        return None
    return _MAPS.get(tensor.untyped_storage().data_ptr())
