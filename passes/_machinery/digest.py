"""Digests of programs, batches and code: what the cache's keys are made of. No tensor is hashed twice in one run."""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch.utils.weak import WeakIdKeyDictionary

from bitlower.ir import Batch, Program, get_tensor
from bitlower.ir.document import encode
from bitlower.ir.storage import release
from bitlower.ir.tensors import tensor_digest
from bitlower.ir.version import __version__

Fingerprint = tuple[int, int, int]
_SAMPLES = 4096
"""Elements of a tensor that are looked at to see that nobody wrote to it; all would take as long as the pass."""
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Changes when ``tensor`` is written to: its address, torch's version counter, a checksum of some elements.

    The version counter misses writes through ``.data``; the elements, spread over the tensor, catch those.
    """
    flat = tensor.detach().cpu().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().view(torch.uint8)
    version = 0 if tensor.is_inference() else tensor._version
    release(tensor)
    return tensor.data_ptr(), version, zlib.crc32(sample.numpy().data) if sample.numel() else 0


def digest_tensor(tensor: torch.Tensor) -> str:
    """The hash of dtype, shape and contents; remembered for as long as ``tensor`` lives and is not written to."""
    print_ = fingerprint(tensor)
    known = _KNOWN[tensor] if tensor in _KNOWN else None  # noqa: SIM401 (its `get` has no types)
    if known is None or known[0] != print_:
        known = (print_, tensor_digest(tensor))
        release(tensor)
        _KNOWN[tensor] = known
    return str(known[1])


def digest_program(program: Program) -> str:
    """The hash of all that ``program`` is, with :func:`digest_tensor` for its tensors."""
    document, tensors = encode(program)
    state = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        state.update(f"{name}={digest_tensor(tensor_of(program, name))};".encode())
    return state.hexdigest()


def tensor_of(program: Program, name: str) -> torch.Tensor:
    """The tensor ``graph/name``."""
    graph, _, target = name.partition("/")
    return get_tensor(program.graphs[graph], target)


def digest_batches(batches: Iterable[Batch]) -> str:
    """The hash of all batches, in order."""
    state = hashlib.sha256()
    for batch in batches:
        state.update(b"batch;")
        for name in sorted(batch):
            state.update(f"{name}={tensor_digest(batch[name])};".encode())
    return state.hexdigest()


def digest_code(cls: type) -> str:
    """The hash of what computes a pass or loss: versions, our sources, and those of its own package or file."""
    module = sys.modules[cls.__module__]
    package = cls.__module__.partition(".")[0]
    state = hashlib.sha256(f"{_digest_own()} {cls.__module__}:{cls.__qualname__}".encode())
    source = getattr(module, "__file__", None)
    if source:
        state.update(Path(source).read_bytes())
    else:  # typed in at a prompt: never the same again
        state.update(os.urandom(32))
    top = getattr(sys.modules.get(package), "__file__", None)
    if package != "bitlower" and top and Path(top).name == "__init__.py":
        state.update(_digest_folder(Path(top).parent))
    return state.hexdigest()


@cache
def _digest_own() -> str:
    """Versions of bitlower and torch, and the sources of ``ir`` and ``passes``: a pass may run any other."""
    passes = Path(__file__).parents[1]
    own = hashlib.sha256(f"{__version__} {torch.__version__}".encode())
    for folder in (passes.parent / "ir", passes):
        own.update(_digest_folder(folder))
    return own.hexdigest()


def _digest_folder(folder: Path) -> bytes:
    """The hash of all Python files below ``folder``, with their paths in it."""
    state = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        state.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size};".encode())
        state.update(file.read_bytes())
    return state.digest()
