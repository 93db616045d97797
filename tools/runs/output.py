"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitlower.ir import BitlowerError
from bitlower.ir.files import check_name
from bitlower.ir.scratch import ScratchError

MARKS = ("manifest.json", "recipe.yaml", "ledger.json")
"""A folder that holds one of these is an artifact, and may be replaced by another one when asked."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``output`` to write into; it becomes ``output`` at the end of the block.

    If the block raises, nothing is left. What a killed run left is removed first. The name is always the same, and it
    is locked, so that two runs cannot write to one output.

    Raises:
        BitlowerError: before the block: the output exists (and ``overwrite`` is off, or it is no artifact), its parent
            cannot be written to, or another run is writing there; in or after it: the disk is full.
    """
    output = Path(os.path.abspath(output))
    temporary, old = output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")
    _check(output, overwrite)
    parents = _make_parents(output)
    try:
        with disk_errors(output), _locked(output):
            _recover(output, temporary, old)
            _check(output, overwrite)
            try:
                temporary.mkdir()
                yield temporary
                _publish(temporary, output, old)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        for parent in reversed(parents):
            with suppress(OSError):
                parent.rmdir()
        raise


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """See, before any work, that an artifact can be written to ``output``.

    Raises:
        BitlowerError: it exists (and ``overwrite`` is off, or it is no artifact).
    """
    _check(Path(os.path.abspath(output)), overwrite)


def default_output(model: str, scheme: str = "") -> Path:
    """Where an artifact goes in the working folder if nobody says: called after the model and the scheme.

    >>> str(default_output("hf:sentence-transformers/all-MiniLM-L6-v2@main", "W8A8"))
    'all-minilm-l6-v2-w8a8'
    """
    named = re.fullmatch(r"(?:hf|package):(.*?)(?:@.*)?", model)
    path = Path(named[1] if named else os.path.abspath(model))
    stem = path.stem if path.suffix in (".gguf", ".yaml", ".yml") else path.name
    return Path("-".join(part.lower() for part in (stem, scheme) if part))


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk, however a library reports it, into one clear error about ``place``, or the place it names.

    Raises:
        BitlowerError: the disk is full.
    """
    try:
        yield
    except ScratchError:
        raise
    except Exception as error:
        if not _says_disk_full(error):
            raise
        if isinstance(error, OSError) and error.filename and not Path(str(error.filename)).is_relative_to(place.parent):
            place = Path(str(error.filename))
        raise BitlowerError(
            f"the disk is full: {place} cannot be written", hint="free some space and run the same command again"
        ) from error


def _says_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or what led to it is a full disk; some libraries only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if "No space left on device" in str(error) and not isinstance(error, BitlowerError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check(output: Path, overwrite: bool) -> None:
    check_name(output.with_name(f".{output.name}.partial"))
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise BitlowerError(f"the output {output} exists already", hint="choose another name, or give --overwrite")
    if not output.is_dir() or not any((output / mark).is_file() for mark in MARKS):
        raise BitlowerError(f"{output} is not an artifact and is not replaced", hint="choose another name")


def _make_parents(output: Path) -> list[Path]:
    """Make the folders that lead to ``output``; give those that are new, outermost first."""
    missing = [parent for parent in reversed(output.parents) if not parent.exists()]
    files = [parent for parent in output.parents if parent.exists() and not parent.is_dir()]
    if files:
        raise BitlowerError(f"the output {output} cannot be written: {files[0]} is not a folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from None
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise _unwritable(output, PermissionError(errno.EACCES, "permission denied"))
    return missing


def _unwritable(output: Path, error: OSError) -> BitlowerError:
    return BitlowerError(f"the output {output} cannot be written: {error.strerror or error}")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold a lock file beside ``output``; the system drops the lock of a killed run."""
    path = output.with_name(f".{output.name}.lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise _unwritable(output, error) from None
    try:
        _lock(handle, output)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, output: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BitlowerError(f"another run is writing to {output}", hint="wait for it, or choose another name") from None


def _recover(output: Path, temporary: Path, old: Path) -> None:
    """Clear what a killed run left: a half-written folder, and the artifact that it was about to replace."""
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _publish(temporary: Path, output: Path, old: Path) -> None:
    """Flush every file to the disk, then move the folder into place."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        _flush(path)
    _flush(temporary)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    _flush(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
