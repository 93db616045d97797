"""The one way to open files that others wrote: regular files only, and no more bytes than the reader expects.

What cannot be read is an :class:`OSError` or a :class:`ValueError`; :func:`reason` says either in a few words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from bitlower.ir.diagnostics import BitlowerError, shorten

LIMIT = 32 << 20
"""Bytes of a file of settings, unless its reader says otherwise."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """``path`` opened for reading bytes; a named pipe is refused before anything could wait for its other end.

    Raises:
        OSError: it is missing, may not be read, or is no regular file.
        ValueError: the name holds a null character.
    """
    _check_regular(os.stat(path))  # devices are not opened: some act on that
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(handle))  # it may be another by now
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for holds, name in _KINDS if holds(status.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def read_bytes(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """What the regular file ``path`` holds.

    Raises:
        OSError: as :func:`open_regular`.
        ValueError: the file has more than ``limit`` bytes, or its name holds a null character.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def read_text(path: str | os.PathLike[str], limit: int = LIMIT) -> str:
    """The UTF-8 text that the regular file ``path`` holds, a byte-order mark left out.

    Raises:
        OSError, ValueError: as :func:`read_bytes`; or the bytes are not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def write_whole(path: Path, data: bytes | Iterable[memoryview]) -> None:
    """Write ``path`` whole or not at all; its folder is made if need be.

    Args:
        path: replaced if it is there.
        data: the bytes, or pieces of them, which are written one by one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [memoryview(data)] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_checked(path: Path, body: bytes) -> None:
    """Write ``body`` behind its hash, for :func:`read_checked`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checked(path: Path) -> bytes:
    """What :func:`write_checked` wrote.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged.
    """
    head, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != head:
        raise ValueError(f"{path} is damaged")
    return body


def check_name(path: str | os.PathLike[str]) -> Path:
    """``path``, whether or not anything is there.

    Raises:
        BitlowerError: no file and no folder can have that name.
    """
    try:
        os.stat(path)
    except ValueError as error:
        raise BitlowerError(f"{shorten(repr(os.fspath(path)))} is no path: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BitlowerError(f"{shorten(str(path))} is no path: {reason(error)}") from None
    return Path(path)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """Why something could not be read, in a few words and without the path."""
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
