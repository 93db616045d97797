"""An output folder appears whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitlower.ir import BitlowerError
from bitlower.tools.runs.output import disk_errors, new_folder


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_is_written_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with new_folder(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    assert listing(tmp_path) == ["new", "new/out", "new/out/a"]


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "new" / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise KeyError
    assert listing(tmp_path) == []


def test_an_existing_output_is_replaced_only_on_demand(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("1")
    with (
        pytest.raises(BitlowerError, match="exists already; choose another name, or give --overwrite"),
        new_folder(output),
    ):
        raise AssertionError
    with pytest.raises(BitlowerError, match="is not an artifact"), new_folder(output, overwrite=True):
        raise AssertionError
    (output / "manifest.json").write_text("{}")
    with pytest.raises(KeyError), new_folder(output, overwrite=True):
        raise KeyError
    assert listing(output) == ["manifest.json", "mine"]
    with new_folder(output, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert listing(tmp_path) == ["out", "out/b"]


def test_an_unwritable_parent_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BitlowerError, match="is not a folder"),
        new_folder(tmp_path / "file" / "out"),
    ):
        raise AssertionError


def test_two_runs_cannot_write_to_one_output(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        with pytest.raises(BitlowerError, match="another run is writing"), new_folder(tmp_path / "out"):
            raise AssertionError
        assert (tmp_path / ".out.partial").is_dir()
    assert (tmp_path / "out").is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from bitlower.tools.runs import output as writing
output, where = Path(sys.argv[1]), sys.argv[2]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
with writing.new_folder(output, overwrite=True) as folder:
    (folder / "manifest.json").write_text("new")
    if where == "inside":
        die()
    if where == "between":
        rename = Path.rename
        Path.rename = lambda self, target: die() if self.name == ".out.partial" else rename(self, target)
    if where == "after":
        writing._flush = lambda path: die() if path == output.parent else None
"""


@pytest.mark.parametrize("where", ["inside", "between", "after"])
def test_a_killed_run_leaves_nothing_that_the_next_one_trips_over(
    tmp_path: Path, where: str, run_script: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text("old")
    assert run_script(KILLED, output, where).returncode == -signal.SIGKILL
    if where == "between":  # the only moment at which the output is away; the next run brings the old one back
        with pytest.raises(BitlowerError, match="exists already"), new_folder(output):
            raise AssertionError
    assert (output / "manifest.json").read_text() == ("new" if where == "after" else "old")
    with new_folder(output, overwrite=True) as folder:
        (folder / "recipe.yaml").write_text("")
    assert listing(tmp_path) == ["out", "out/recipe.yaml"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("write failed: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_error(tmp_path: Path, error: Exception) -> None:
    with (  # noqa: PT012
        pytest.raises(BitlowerError, match=r"the disk is full: .* free some space"),
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("1")
        raise ValueError("serialization failed") from error
    assert listing(tmp_path) == []


def test_a_full_disk_that_was_being_handled_is_found(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match="the disk is full"), new_folder(tmp_path / "out"):  # noqa: PT012
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise ValueError("serialization failed")  # noqa: B904 (as libraries do)


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="denied"), disk_errors(Path("x")):
        raise OSError(errno.EACCES, "denied")
