from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from bitlower.ir import BitlowerError, CheckError, Program, set_tensor
from bitlower.passes import Context, Observer, Pass, PassManager, PrintAfterChange, Progress, Timing, Verify

MIB = 2**20


@dataclass(frozen=True)
class Work(Pass):
    """Iterate, allocate, wait, fail: as asked."""

    name: ClassVar[str] = "work"
    items: int = 0
    mib: int = 0
    seconds: float = 0.0
    change: bool = False
    fail: bool = False

    def run(self, program: Program, context: Context) -> bool:
        assert [*context.track(range(self.items), "items")] == [*range(self.items)]
        held = torch.ones(self.mib * MIB, dtype=torch.uint8)
        time.sleep(self.seconds)
        del held
        if self.fail:
            raise BitlowerError("told to fail")
        if self.change:
            node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.gelu.default)
            node.target = torch.ops.aten.relu.default
        return self.change


def test_timing_gives_seconds_and_peak_memory_of_each_pass(tiny_program: Program) -> None:
    timing = Timing(interval=0.005)
    PassManager([Work(), Work(mib=200, seconds=0.2), Work()], [timing]).run(tiny_program, Context())
    first, second, third = timing.rows
    assert [row.name for row in timing.rows] == ["work"] * 3
    assert second.seconds >= 0.2
    assert second.peak_bytes - first.peak_bytes > 150 * MIB
    assert second.peak_bytes - third.peak_bytes > 150 * MIB


def test_timing_stops_its_thread_when_a_pass_fails(tiny_program: Program) -> None:
    timing = Timing()
    with pytest.raises(BitlowerError):
        PassManager([Work(fail=True)], [timing]).run(tiny_program, Context())
    assert len(timing.rows) == 1
    assert timing._sampler is None


def test_progress_lends_a_bar_and_says_what_was_done(tiny_program: Program) -> None:
    text, context = io.StringIO(), Context()
    track = context.track
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    PassManager([Work(items=3), Work(change=True)], [Progress(console, total=2)]).run(tiny_program, context)
    assert context.track is track
    assert "[1/2] work{items=3}: unchanged" in text.getvalue()
    assert "[2/2] work{change=true}: changed" in text.getvalue()
    assert "items" in text.getvalue().split("unchanged")[0]


class Counting:
    """A label that reads differently each time."""

    count = 0

    def __str__(self) -> str:
        self.count += 1
        return f"seen {self.count}"


def test_a_label_is_read_anew_at_each_item(tiny_program: Program) -> None:
    console, context, label = Console(file=io.StringIO(), force_terminal=True, width=100), Context(), Counting()
    bar = Progress(console)
    bar.before(Work(), tiny_program, context)
    before = label.count
    assert list(context.track(range(3), label)) == [0, 1, 2]
    assert label.count >= before + 4
    bar.after(Work(), tiny_program, context, False)


def test_progress_writes_plain_lines_where_there_is_no_terminal(tiny_program: Program) -> None:
    text, context = io.StringIO(), Context()
    track = context.track
    with pytest.raises(BitlowerError):
        PassManager([Work(items=2), Work(fail=True)], [Progress(Console(file=text))]).run(tiny_program, context)
    assert text.getvalue() == "work{items=2}: unchanged\n"
    assert context.track is track


def test_print_after_change_prints_the_program_once_it_changed(tiny_program: Program) -> None:
    text = io.StringIO()
    result = PassManager([Work(), Work(change=True)], [PrintAfterChange(text)]).run(tiny_program, Context())
    assert text.getvalue() == f"; after work{{change=true}}\n{result}"


def test_print_after_change_can_print_the_difference(tiny_program: Program) -> None:
    text = io.StringIO()
    PassManager([Work(change=True)], [PrintAfterChange(text, diff=True)]).run(tiny_program, Context())
    changed = [line for line in text.getvalue().splitlines() if line[:1] in "+-" and line[:2] not in ("++", "--")]
    assert changed == [
        "-  %gelu: float32[batch, 32] = gelu(%linear)",
        "+  %gelu: float32[batch, 32] = relu(%linear)",
    ]


def test_verify_looks_before_other_observers_do(tiny_program: Program) -> None:
    class Poison(Pass):
        name = "poison"

        def run(self, program: Program, context: Context) -> bool:
            set_tensor(program.module, "head.bias", torch.nn.Parameter(torch.full((4,), torch.nan)))
            return True

    class Later(Observer):
        seen = False

        def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
            self.seen = True

    later = Later()
    with pytest.raises(CheckError):
        PassManager([Poison()], [later]).run(tiny_program, Context())
    assert not later.seen
    with pytest.raises(CheckError):
        PassManager([Poison()], [later, Verify()]).run(tiny_program, Context())
    assert later.seen
