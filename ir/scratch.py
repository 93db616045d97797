"""Temporary folders, whose trouble is named: libraries that write there say little when the place is full."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.files import reason

_PROBE = 1 << 20
"""Bytes; a folder that does not take so many more is full."""
_HINT = "free some space there, or set TMPDIR to another folder"


class ScratchError(BitlowerError):
    """The system's temporary folder is full or cannot be written to."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, which is removed at the end.

    Raises:
        ScratchError: it cannot be made; or what the block raises is because it is full, whatever the block says.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="bitlower-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ScratchError(f"no temporary folder can be made: {reason(error)}", hint=_HINT) from error
    with made as folder:
        try:
            yield Path(folder)
        except Exception as error:
            if not is_full(Path(folder)):
                raise
            raise ScratchError(f"the temporary folder {Path(folder).parent} is full", hint=_HINT) from error


def is_full(folder: Path) -> bool:
    """Whether ``folder`` takes no more bytes."""
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    finally:
        probe.unlink(missing_ok=True)
    return False
