"""What people see: bars on terminals alone, tables of the terminal's width, lines as they are."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from bitlower.tools import render
from bitlower.tools.render import Display, make_table, show


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns would show."""
    screen = io.StringIO()
    monkeypatch.setattr(render, "Console", lambda **_: Console(force_terminal=True, file=screen, width=80))
    return screen


def test_a_prediction_is_a_bar_with_the_time_left(terminal: io.StringIO) -> None:
    with Display().expecting("writing", 0.5):
        time.sleep(0.7)  # longer than it should have taken
    shown = terminal.getvalue()
    assert "writing" in shown
    assert "left" in shown
    assert "0:00:01" in shown or "0:00:00" in shown
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_without_a_prediction_only_the_time_is_shown(terminal: io.StringIO) -> None:
    with Display().expecting("loading"):
        pass
    assert "loading" in terminal.getvalue()
    assert "left" not in terminal.getvalue()


def test_the_bar_ends_with_an_error(terminal: io.StringIO) -> None:
    with pytest.raises(KeyError), Display().expecting("writing", 60.0):
        raise KeyError("x")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("display", [Display(), Display(quiet=True), Display(machine=True)])
def test_nothing_is_drawn_elsewhere(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    with display.expecting("writing", 0.1):
        pass
    assert capsys.readouterr() == ("", "")


def test_tables_fit_the_columns_that_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("gptq", " ".join(["word"] * 60))]
    monkeypatch.setenv("COLUMNS", "72")
    show(make_table("passes", ("pass", "what it does"), rows), "a line " * 30)
    *table, line = capsys.readouterr().out.rstrip("\n").split("\n")
    assert max(map(len, table)) <= 72
    assert line.startswith("a line a line")
    assert len(line) > 200
    assert all(word in ("word", "gptq") for row in table[4:-1] for word in row.replace("│", " ").split())
    monkeypatch.delenv("COLUMNS")
    show(make_table("passes", ("pass", "what it does"), rows))
    assert max(map(len, capsys.readouterr().out.split("\n"))) > 150
