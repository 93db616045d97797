from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bitlower.ir import BitlowerError, CheckError, Level, Program, get_tensor, set_tensor
from bitlower.passes import Context, Contract, Observer, Pass, PassManager, Record, load_plugin, make_pass
from bitlower.passes._machinery import registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Seen:
    level: str


@dataclass(frozen=True)
class Count:
    number: int


@dataclass(frozen=True)
class Told(Record):
    words: str

    def summary(self) -> str:
        return self.words


@dataclass(frozen=True)
class Tell(Pass):
    """Leave a record."""

    name: ClassVar[str] = "tell"

    def run(self, program: Program, context: Context) -> bool:
        context.put(Told("the first pass"))
        return False


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply a weight."""

    name: ClassVar[str] = "scale"
    preserves: ClassVar[frozenset[type]] = frozenset({Count})
    factor: float = 2.0

    def run(self, program: Program, context: Context) -> bool:
        context.put(Seen(str(program.level)))
        weight = get_tensor(program.module, "head.weight")
        set_tensor(program.module, "head.weight", torch.nn.Parameter(weight.detach() * self.factor))
        return self.factor != 1.0


@dataclass(frozen=True)
class Exact(Scale):
    name: ClassVar[str] = "exact"
    contract: ClassVar[Contract] = Contract.EXACT


@dataclass(frozen=True)
class Look(Pass):
    name: ClassVar[str] = "look"
    contract: ClassVar[Contract] = Contract.ANALYSIS
    edit: str = "nothing"

    def run(self, program: Program, context: Context) -> bool:
        context.put(Count(len(program.graph.nodes)))
        if self.edit == "graph":
            program.graph.output_node().args = (program.graph.output_node().args[0][::-1],)
        if self.edit == "weight":
            set_tensor(program.module, "head.bias", torch.zeros(4))
        return self.edit == "claims"


@dataclass(frozen=True)
class Lower(Pass):
    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    ensures: ClassVar[Level | None] = Level.SIMULATED
    works: bool = True

    def run(self, program: Program, context: Context) -> bool:
        return self.works


@dataclass(frozen=True)
class Finish(Pass):
    name: ClassVar[str] = "finish"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})

    def run(self, program: Program, context: Context) -> bool:
        return True


@dataclass(frozen=True)
class Faulty(Pass):
    name: ClassVar[str] = "faulty"
    way: str = "raise"

    def run(self, program: Program, context: Context) -> Any:
        match self.way:
            case "raise":
                raise TypeError("no such thing\nat all")
            case "refuse":
                raise BitlowerError("not with me")
            case "none":
                return None
            case "in-place":
                with torch.no_grad():
                    get_tensor(program.module, "head.weight").mul_(2)
            case "data":
                get_tensor(program.module, "head.weight").data.mul_(2)
            case "broken":
                set_tensor(program.module, "head.bias", torch.full((4,), torch.nan))
        return True


class Log(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        self.events.append(("before", pass_.name, program))

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        self.events.append(("after", pass_.name, changed))

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        self.events.append(("failed", pass_.name, error))


@pytest.fixture
def context() -> Context:
    generator = torch.Generator().manual_seed(3)
    return Context(evaluation=[{"x": torch.randn(5, 16, generator=generator)} for _ in range(2)])


def test_passes_run_in_order_on_clones(tiny_program: Program, context: Context) -> None:
    digest, log = tiny_program.digest(), Log()
    result = PassManager([Scale(2.0), Scale(0.5), Scale(3.0)], [log]).run(tiny_program, context)
    assert tiny_program.digest() == digest
    x = context.evaluation[0]["x"]
    bias = get_tensor(tiny_program.module, "head.bias")
    expected = 3 * (tiny_program(x=x)["logits"] - bias) + bias
    torch.testing.assert_close(result(x=x)["logits"], expected)
    assert result.passes == ["scale", "scale{factor=0.5}", "scale{factor=3.0}"]
    assert tiny_program.passes == []
    assert [event[:2] for event in log.events] == [(e, "scale") for _ in range(3) for e in ("before", "after")]


def test_an_unchanged_program_stays_the_same_object(tiny_program: Program, context: Context) -> None:
    log = Log()
    assert PassManager([Scale(1.0), Look()], [log]).run(tiny_program, context) is tiny_program
    assert [event[2] for event in log.events if event[0] == "after"] == [False, False]


def test_the_levels_are_checked_before_any_work(tiny_program: Program, context: Context) -> None:
    log = Log()
    with pytest.raises(BitlowerError, match=r"pass 3, 'lower', takes a program at level float; here it is simulated"):
        PassManager([Scale(), Lower(), Lower()], [log]).run(tiny_program, context)
    assert log.events == []
    with pytest.raises(BitlowerError, match=r"pass 1, 'finish', .* level simulated; here it is float; put 'quantize'"):
        PassManager([Finish(), Lower()], [log]).run(tiny_program, context)
    assert PassManager([Lower(), Finish()], [log]).run(tiny_program, context).level is Level.SIMULATED


def test_the_level_is_checked_again_where_a_pass_did_not_lower(tiny_program: Program, context: Context) -> None:
    with pytest.raises(BitlowerError, match=r"'finish', takes a program at level simulated; here it is float"):
        PassManager([Lower(works=False), Finish()]).run(tiny_program, context)


def test_a_change_drops_the_results_that_it_does_not_preserve(tiny_program: Program, context: Context) -> None:
    PassManager([Look(), Scale(2.0)]).run(tiny_program, context)
    assert set(context.results) == {Count, Seen}  # Count is preserved, Seen is new
    PassManager([Look(), Lower()]).run(tiny_program, context)
    assert set(context.results) == set()
    PassManager([Look(), Scale(1.0), Lower(works=False)]).run(tiny_program, context)
    assert set(context.results) == {Count, Seen}


def test_a_record_lasts_whatever_changes(tiny_program: Program, context: Context) -> None:
    PassManager([Tell(), Lower(), Finish()]).run(tiny_program, context)
    assert context.results == {Told: Told("the first pass")}


def test_an_exact_pass_that_is_exact_goes_through(tiny_program: Program, context: Context) -> None:
    assert PassManager([Exact(1.0 + 1e-7)]).run(tiny_program, context).passes


def test_an_exact_pass_that_is_not_is_caught_at_the_first_node(tiny_program: Program, context: Context) -> None:
    with pytest.raises(
        CheckError, match=r"'exact' says it is exact, but the output 'logits' differs: by up to"
    ) as info:
        PassManager([Exact(1.01)]).run(tiny_program, context)
    assert "the first value that differs is %linear_2" in str(info.value)
    assert "in head at tiny.py: linear_2" in str(info.value)
    assert info.value.exit_code == 1


def test_exactness_is_checked_on_calibration_batches_if_need_be(tiny_program: Program, context: Context) -> None:
    with pytest.raises(CheckError):
        PassManager([Exact(1.01)]).run(tiny_program, Context(calibration=context.evaluation))


@pytest.mark.parametrize("edit", ["graph", "weight", "claims"])
def test_an_analysis_keeps_its_hands_off(tiny_program: Program, context: Context, edit: str) -> None:
    with pytest.raises(CheckError, match="'look' says it is an analysis, but it changed the program"):
        PassManager([Look(edit)]).run(tiny_program, context)


@pytest.mark.parametrize("way", ["in-place", "data"])
def test_writing_into_a_shared_tensor_is_caught(tiny_program: Program, context: Context, way: str) -> None:
    with pytest.raises(CheckError, match=r"'faulty' wrote into the tensor 'model/head.weight', which other programs"):
        PassManager([Faulty(way)]).run(tiny_program, context)


def test_the_result_is_verified_unless_told_otherwise(tiny_program: Program, context: Context) -> None:
    with pytest.raises(CheckError, match=r"head.bias"):
        PassManager([Faulty("broken")]).run(tiny_program, context)
    PassManager([Faulty("broken")], verify=False).run(tiny_program, context)


def test_a_pass_says_whether_it_changed_anything(tiny_program: Program, context: Context) -> None:
    with pytest.raises(BitlowerError, match="the pass 'faulty' returned NoneType; `run` returns True if"):
        PassManager([Faulty("none")]).run(tiny_program, context)


def test_a_refusal_carries_the_pass_as_a_note(tiny_program: Program, context: Context) -> None:
    log = Log()
    with pytest.raises(BitlowerError, match="not with me") as info:
        PassManager([Scale(), Faulty("refuse")], [log]).run(tiny_program, context)
    assert str(info.value) == "pass 'faulty': not with me"
    assert "in the pass faulty{way=refuse}" in info.value.__notes__
    assert log.events[-1] == ("failed", "faulty", info.value)


def test_a_third_partys_error_becomes_one_line(tiny_program: Program, context: Context) -> None:
    with pytest.raises(BitlowerError, match=r"^pass 'faulty' failed: TypeError: no such thing at .*\.py:\d+") as info:
        PassManager([Faulty()]).run(tiny_program, context)
    assert isinstance(info.value.__cause__, TypeError)
    line = int(str(info.value).rpartition(":")[2])
    assert 'raise TypeError("no such thing' in Path(__file__).read_text().splitlines()[line - 1]


def test_the_line_is_the_plugins_though_torch_raised(
    tiny_program: Program, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    text = """
import torch
from dataclasses import dataclass
from bitlower.passes import Pass

@dataclass(frozen=True)
class Bad(Pass):
    name = "bad"

    def run(self, program):
        return multiply()

def multiply():
    return torch.ones(2) @ torch.ones(3)
"""
    (tmp_path / "bad.py").write_text(text)
    load_plugin(tmp_path / "bad.py")
    with pytest.raises(BitlowerError, match=r"^pass 'bad' failed: RuntimeError: .* at bad.py:14\n"):
        PassManager([make_pass("bad")]).run(tiny_program, context)


def test_an_observer_that_fails_does_not_hide_the_error(tiny_program: Program, context: Context) -> None:
    class Clumsy(Observer):
        def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
            raise OSError("disk full")

    log = Log()
    with pytest.raises(BitlowerError, match="not with me") as info:
        PassManager([Faulty("refuse")], [Clumsy(), log]).run(tiny_program, context)
    assert "and Clumsy failed on it: disk full" in info.value.__notes__
    assert log.events[-1][0] == "failed"
