"""Signals that end a run: the exit code that shells expect, one line, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitlower.tools.cli import app, main
from bitlower.tools.cli.signals import EndedError, Signals
from bitlower.tools.runs.output import new_folder

ROOT = Path(__file__).parents[3]
ENDS = [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "hung up")]


@pytest.fixture(autouse=True)
def _as_in_a_shell() -> Iterator[None]:
    """Handlers as a process has them that was started in the foreground; in the background SIGINT is ignored."""
    handlers = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    kept = [signal.signal(getattr(signal, end[0]), handler) for end, handler in zip(ENDS, handlers, strict=True)]
    yield
    for end, handler in zip(ENDS, kept, strict=True):
        signal.signal(getattr(signal, end[0]), handler)


def swallowed(number: signal.Signals) -> None:
    """The signal comes while a library runs that makes its own of it."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt as error:
        raise RecursionError("maximum recursion depth exceeded") from error


@pytest.mark.parametrize("how", ["plain", "swallowed"])
@pytest.mark.parametrize(("name", "code", "word"), ENDS)
def test_a_signal_ends_the_run_and_leaves_nothing(
    name: str, code: int, word: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(arguments: list[str]) -> int:
        with new_folder(tmp_path / "new" / "out") as folder:
            (folder / "half").write_text("written")
            assert [path.name for path in (tmp_path / "new").glob(".*")]
            number = signal.Signals[name]
            swallowed(number) if how == "swallowed" else os.kill(os.getpid(), number)
        return 0

    before = [signal.getsignal(getattr(signal, end[0])) for end in ENDS]
    monkeypatch.setattr(app, "run", run)
    assert main(["run", "--json"]) == code
    assert capsys.readouterr() == (f'{{"error": "{word}", "exit_code": {code}}}\n', f"error: {word}\n")
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(getattr(signal, end[0])) for end in ENDS] == before


def test_the_clearing_up_is_not_cut_short() -> None:
    steps = []
    with Signals() as signals:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            steps.append("cleared")
        with pytest.raises(EndedError):
            os.kill(os.getpid(), signal.SIGINT)  # who presses again means it
    assert (steps, signals.word, signals.exit_code) == (["cleared"], "terminated", 143)


def test_a_signal_that_is_ignored_stays_so() -> None:
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.word == ""
    finally:
        signal.signal(signal.SIGHUP, kept)


@pytest.mark.parametrize("how", ["raise", "raise RecursionError('half imported')", "pass; raise ImportError('x')"])
def test_an_interruption_of_the_imports_is_one(how: str) -> None:
    script = f"""
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                {how}

sys.meta_path.insert(0, Interrupting())
from bitlower.tools.cli import command
command()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_thread_that_is_left_does_not_keep_the_process() -> None:
    script = """
import threading, time
from bitlower.tools import cli
cli.main = lambda: print("done") or 3
threading.Thread(target=time.sleep, args=(600,)).start()
cli.command()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "done\n")
