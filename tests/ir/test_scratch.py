from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from bitlower.ir import scratch
from bitlower.ir.scratch import ScratchError, is_full, scratch_folder


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_temporary_folder_is_removed() -> None:
    with pytest.raises(KeyError, match="other"), scratch_folder() as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise KeyError("other")
    assert not folder.exists()


def test_whatever_a_library_says_of_a_full_place_the_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"the temporary folder {tempfile.gettempdir()} is full; free"
    with pytest.raises(ScratchError, match=message), scratch_folder() as folder:  # noqa: PT012
        monkeypatch.setattr(os, "fsync", full)
        raise RuntimeError("Protobuf serialization failed.")
    assert not folder.exists()


def test_a_place_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.tempfile, "TemporaryDirectory", full)
    message = "no temporary folder can be made: No space left on device; free"
    with pytest.raises(ScratchError, match=message), scratch_folder():
        pass


def test_a_place_with_room_is_not_full(tmp_path: Path) -> None:
    assert not is_full(tmp_path)
    assert not is_full(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
