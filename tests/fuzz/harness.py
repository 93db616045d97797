"""Runs inputs in children that may hang, crash or run out of memory, and says how each of them ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bitlower.ir import BitlowerError, CheckError

SECONDS = 20
"""Of the processor, for an input; and of the clock, for one that waits for something:"""
WAITING = 180
MEMORY = 3 << 30
LINES, CHARACTERS = 25, 2000
GOOD = ("valid", "refused", "check failed")


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Args:
        write: makes a changed input in an empty folder.
        attempt: gives it to the project.
    """

    write: Callable[[Path, Random], None]
    attempt: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """How the input ``index`` of a kind ended, with its message if it is not good."""

    index: int
    result: str
    detail: str = ""


def random_of(seed: int, kind: str, index: int) -> Random:
    """What the input is drawn with; nothing else decides what it is."""
    return Random(f"{seed}/{kind}/{index}")


def run(name: str, kind: Kind, indices: list[int], seed: int, kept: Path | None = None) -> Iterator[Outcome]:
    """The outcomes of the inputs ``indices``, in order; those that end badly are copied to ``kept``."""
    waiting = list(indices)
    while waiting:
        with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
            reader, child = _start(name, kind, waiting, seed, Path(scratch))
            with os.fdopen(reader, "rb") as stream:
                for outcome in _listen(stream, child, waiting):
                    waiting.remove(outcome.index)
                    if kept is not None and outcome.result not in GOOD:
                        folder = kept / f"{name}-{seed}-{outcome.index}"
                        shutil.rmtree(folder, ignore_errors=True)
                        folder.mkdir(parents=True)
                        with contextlib.suppress(OSError, ValueError, RecursionError):
                            kind.write(folder, random_of(seed, name, outcome.index))
                        (folder / "outcome.txt").write_text(f"{outcome.result}\n{outcome.detail}\n")
                    yield outcome


def _start(name: str, kind: Kind, indices: list[int], seed: int, scratch: Path) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    status = 1
    try:
        os.close(reader)
        _bound_memory()
        tempfile.tempdir = str(scratch / "temporary")
        os.environ["TMPDIR"] = tempfile.tempdir
        os.mkdir(tempfile.tempdir)
        for index in indices:
            outcome = _one(kind, random_of(seed, name, index), scratch)
            os.write(writer, json.dumps([index, *outcome]).encode() + b"\n")
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _listen(stream: io.BufferedReader, child: int, waiting: list[int]) -> Iterator[Outcome]:
    """What the child reports; its last input is blamed when it hangs or dies."""
    pending = list(waiting)
    while pending:
        ready, _, _ = select.select([stream], [], [], WAITING)
        line = stream.readline() if ready else b""
        if line:
            index, result, detail = json.loads(line)
            pending.remove(index)
            yield Outcome(index, result, detail)
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        hangs = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
        yield Outcome(pending[0], "hang" if hangs else "crash", f"status {status}")
        return
    os.waitpid(child, 0)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _one(kind: Kind, random: Random, scratch: Path) -> tuple[str, str]:
    folder = scratch / "input"
    folder.mkdir()
    try:
        kind.write(folder, random)
        before = _listing(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the child
            result, detail = _ending(kind, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
        left = sorted({*(_listing(folder) ^ before), *(path.name for path in (scratch / "temporary").iterdir())})
        if result in GOOD and left:
            return "left behind", ", ".join(left)[:300]
        return result, detail
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in (scratch / "temporary").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _ending(kind: Kind, folder: Path) -> tuple[str, str]:
    try:
        kind.attempt(folder)
    except BitlowerError as error:
        message = str(error)
        if len(message) > CHARACTERS or len(message.splitlines()) > LINES:
            return "long message", message[:CHARACTERS]
        return ("check failed" if isinstance(error, CheckError) else "refused"), ""
    except BaseException as error:  # what the project lets through is what we look for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "unexpected", f"{type(error).__name__}: {str(error)[:300]} at {place.filename}:{place.lineno}"
    return "valid", ""


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
