"""Passes of third parties that do what they must not: each ends in an error that names it, and nothing stays behind."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError, Program, TensorType, get_tensor, set_tensor, verifier
from bitlower.passes import Context, Ledger, Pass, PassManager, load_plugin, make_pass, parse_pipeline
from bitlower.passes._machinery import registry
from bitlower.passes._machinery.declared import (
    data_runs,
    needs_calibration,
    training_evaluations,
    training_steps,
    trains,
)

Run = Callable[[Program, Context], Any]


class Own(BaseException):
    """Neither an Exception nor one of Python's."""


class Refusal(BitlowerError):
    exit_code = 0


class Silent(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@dataclass(frozen=True)
class Bad(Pass):
    name: ClassVar[str] = "bad"
    which: str = "exit"

    def run(self, program: Program, context: Context) -> Any:
        result = FAULTS[self.which][0](program, context)
        return True if result is None else result


def raising(error: BaseException) -> Run:
    def run(program: Program, context: Context) -> None:
        raise error

    return run


def weight(program: Program) -> torch.nn.Parameter:
    found = get_tensor(program.module, "head.weight")
    assert isinstance(found, torch.nn.Parameter)
    return found


def replaced(tensor: Callable[[torch.Tensor], torch.Tensor], *, typed: bool = False) -> Run:
    """Put another tensor in the place of a weight, with its type in the graph if ``typed``."""

    def run(program: Program, context: Context) -> None:
        value = tensor(weight(program).detach())
        set_tensor(program.module, "head.weight", torch.nn.Parameter(value, requires_grad=False))
        for node in program.graph.find_nodes(op="get_attr", target="head.weight") if typed else ():
            node.meta["type"] = TensorType(value.dtype, tuple(value.shape))

    return run


def declares(name: str, value: Any) -> Run:
    def run(program: Program, context: Context) -> None:
        setattr(Bad, name, value)

    return run


def text_for_tensor(program: Program, context: Context) -> None:
    del program.module.head.weight
    program.module.head.weight = "no tensor"


def no_output(program: Program, context: Context) -> None:
    node = program.graph.output_node()
    node.args = (node.args[0][:1],)
    program.outputs = program.outputs[:1]


def no_meta(program: Program, context: Context) -> None:
    for node in program.graph.nodes:
        node.meta.clear()


def cycle(program: Program, context: Context) -> None:
    first, *_, last = (node for node in program.graph.nodes if node.op == "call_function")
    first.args = (last, *first.args[1:])


def put_opaque(program: Program, context: Context) -> None:
    context.put(threading.Lock())


def left_thread(program: Program, context: Context) -> None:
    threading.Thread(target=RELEASE.wait, args=(20,), name="left-over").start()


def patch_and_fail(program: Program, context: Context) -> None:
    Program.recompile = print  # type: ignore[assignment,method-assign]
    raise ValueError("after that")


def assign(name: str, value: Any) -> Run:
    return lambda program, context: setattr(program, name, value)


RELEASE = threading.Event()
FAULTS: dict[str, tuple[Run, str]] = {
    "exit": (lambda *_: sys.exit(0), r"^pass 'bad' failed: SystemExit: 0 at .*\.py:\d+"),
    "exit-none": (raising(SystemExit()), r"^pass 'bad' failed: SystemExit at"),
    "generator-exit": (raising(GeneratorExit()), r"^pass 'bad' failed: GeneratorExit"),
    "own-base": (raising(Own("what")), r"^pass 'bad' failed: Own: what"),
    "code-zero": (raising(Refusal("no")), r"^pass 'bad' failed: Refusal: no"),
    "refusal": (raising(BitlowerError("no", hint="yes")), r"^pass 'bad': no; yes"),
    "memory": (raising(MemoryError()), r"^pass 'bad' failed: MemoryError"),
    "stop": (raising(StopIteration()), r"^pass 'bad' failed: StopIteration"),
    "no-text": (raising(Silent()), r"^pass 'bad' failed: Silent: \(its text cannot be read\)"),
    "long-text": (raising(ValueError("x" * 10**6)), r"^pass 'bad' failed: ValueError: x+ … x+ at"),
    "recursion": (lambda p, c: FAULTS["recursion"][0](p, c), r"^pass 'bad' failed: RecursionError"),
    "returns": (lambda *_: 3, "the pass 'bad' returned int"),
    "graph-gone": (lambda p, _: p.graphs.clear(), "the pass 'bad' broke the program: its graph 'model' is gone"),
    "graphs-text": (assign("graphs", "x"), "broke the program: its graphs are of type str"),
    "graph-text": (lambda p, _: p.graphs.update(model="x"), "its graph 'model' is of type str"),
    "inputs-none": (assign("inputs", None), "'bad' broke the program: its inputs is nothing"),
    "outputs-text": (assign("outputs", ("logits",)), "its outputs are not all of type ValueSpec"),
    "outputs-gone": (no_output, "'bad' broke the program: its outputs are hidden, not hidden, logits"),
    "output-node-gone": (lambda p, _: p.graph.erase_node(p.graph.output_node()), "'model' has not one output"),
    "config": (assign("config", {"a": object()}), "'bad' broke the program: its config is no plain data"),
    "assets": (assign("assets", {"a": "text"}), "'bad' broke the program: its assets are not bytes by name"),
    "tensor-text": (text_for_tensor, "'bad' broke the program: %head_weight reads 'head.weight', which is no tensor"),
    "meta-gone": (no_meta, "'bad' broke the program: .*its meta has no 'type'|'bad' broke the program: %"),
    "cycle": (cycle, r"^pass 'bad' failed: RuntimeError: Argument 'linear_2' of Node 'linear' was used before"),
    "dtype": (replaced(torch.Tensor.double), r"'bad' broke the program: %head_weight .* is of type"),
    "shape": (replaced(lambda t: t[:, :3]), r"'bad' broke the program: %head_weight .* is of type"),
    "typed-dtype": (replaced(torch.Tensor.double, typed=True), r"^pass 'bad' failed: RuntimeError"),
    "typed-shape": (replaced(lambda t: t[:, :3], typed=True), r"^pass 'bad' failed: RuntimeError"),
    "nan": (replaced(lambda t: t * torch.nan), r"'bad' broke the program: the tensor 'head.weight' holds NaN"),
    "batch": (lambda _, c: c.calibration[1]["x"].zero_(), "wrote into the calibration data: 'x' of batch 2"),
    "batch-data": (lambda _, c: c.evaluation[0]["x"].data.fill_(1), "wrote into the evaluation data: 'x' of batch 1"),
    "batch-numpy": (lambda _, c: c.calibration[0]["x"].numpy().fill(1), "the calibration data: 'x' of batch 1"),
    "batch-key": (lambda _, c: c.calibration[0].update(y=torch.ones(1)), "calibration data: 'y' of batch 1"),
    "batch-text": (lambda _, c: c.calibration[0].update(x="text"), "calibration data: 'x' of batch 1"),
    "batch-list": (lambda _, c: c.calibration.clear(), "the pass 'bad' left 0 of 2 calibration batches"),
    "ensures": (declares("ensures", 5), "the pass 'bad' changed what it declares while it ran"),
    "preserves": (declares("preserves", 5), "the pass 'bad' changed what it declares while it ran"),
    "renamed": (declares("name", "clean"), "the pass 'bad' changed what it declares while it ran"),
    "verifier": (lambda *_: setattr(verifier, "verify", print), r"'bad' replaced bitlower\.ir\.verifier\.verify;"),
    "method": (lambda *_: setattr(Program, "recompile", print), r"'bad' replaced .*\.Program\.recompile"),
    "patched-and-failed": (patch_and_fail, r"^pass 'bad' failed: ValueError: after that at"),
    "thread": (left_thread, "the pass 'bad' left the thread 'left-over' running"),
}  # fmt: skip


@pytest.fixture
def context() -> Context:
    generator = torch.Generator().manual_seed(3)
    data = [[{"x": torch.randn(5, 16, generator=generator)} for _ in range(2)] for _ in range(2)]
    return Context(calibration=data[0], evaluation=data[1])


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    for name in ("ensures", "preserves", "name"):
        monkeypatch.setattr(Bad, name, getattr(Bad, name))
    RELEASE.clear()
    yield
    RELEASE.set()


@pytest.mark.parametrize("which", FAULTS)
def test_a_fault_of_a_pass_is_an_error_that_names_it(tiny_program: Program, context: Context, which: str) -> None:
    digest, verify, recompile = tiny_program.digest(), verifier.verify, Program.recompile
    with pytest.raises(BitlowerError, match=FAULTS[which][1]) as info:
        PassManager([Bad(which)], [Ledger()]).run(tiny_program, context)
    assert info.value.exit_code in (1, 2)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000
    assert tiny_program.digest() == digest
    assert (verifier.verify, Program.recompile) == (verify, recompile)


def test_the_users_interruption_is_not_the_passs_fault(
    tiny_program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAULTS, "interrupt", (raising(KeyboardInterrupt()), ""))
    with pytest.raises(KeyboardInterrupt):
        PassManager([Bad("interrupt")]).run(tiny_program, context)


def meddle(program: Program, context: Context) -> bool:
    os.chdir("/")
    os.environ["BITLOWER_MEDDLED"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    np.seterr(all="raise")
    torch.nn.modules.module.register_module_forward_hook(lambda *_: pytest.fail("a hook is left"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setrecursionlimit(900)
    sys.stdout.close()
    sys.stderr = None  # type: ignore[assignment]
    os.close(1)
    return False


def test_what_a_pass_changes_of_the_process_is_put_back(
    tiny_program: Program, context: Context, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> list[Any]:
        settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), np.geterr()
        others = torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGTERM), sys.getrecursionlimit()
        draws = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        return [os.getcwd(), dict(os.environ), sys.stdout, sys.stderr, settings, others, draws]

    monkeypatch.setitem(FAULTS, "meddle", (meddle, ""))
    before = state()
    PassManager([Bad("meddle")]).run(tiny_program, context)
    assert state() == before
    os.write(1, b"still open\n")
    assert capfd.readouterr().out == "still open\n"
    tiny_program(x=context.evaluation[0]["x"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("preserves", 5, "the pass 'bad' preserves 5; `preserves` is a frozenset of types"),
        ("preserves", {"x"}, "the pass 'bad' preserves {'x'}"),
        ("ensures", "integer-ish", "the pass 'bad' has no proper levels"),
        ("requires", {1}, "the pass 'bad' has no proper levels"),
        ("requires", frozenset(), "the pass 'bad' takes no level"),
        ("contract", "exact", "the pass 'bad' has the contract 'exact'"),
    ],
)
def test_what_a_pass_sets_by_hand_is_checked_before_any_work(
    tiny_program: Program, context: Context, name: str, value: Any, message: str
) -> None:
    pass_ = Bad()
    object.__setattr__(pass_, name, value)
    with pytest.raises(BitlowerError, match=message):
        PassManager([make_pass("clean"), pass_]).run(tiny_program, context)


def test_what_is_no_pass_is_refused(tiny_program: Program, context: Context) -> None:
    with pytest.raises(BitlowerError, match=r"str is no pass; derive from bitlower\.Pass"):
        PassManager(["clean"]).run(tiny_program, context)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (raising(SystemExit(0)), r"pass 'bad' cannot say how often it runs over the data: SystemExit: 0 at"),
        (lambda *_: "often", r"pass 'bad' cannot say how often .*: 'often' is no number of runs"),
        (lambda *_: -1, r"pass 'bad' cannot say how often .*: -1 is no number of runs"),
    ],
)
def test_a_pass_that_cannot_count_its_runs_is_named(
    tiny_program: Program, monkeypatch: pytest.MonkeyPatch, count: Run, message: str
) -> None:
    monkeypatch.setattr(Bad, "data_runs", count)
    with pytest.raises(BitlowerError, match=message):
        data_runs(Bad(), tiny_program)


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("training_steps", lambda *_: 1.5, r"pass 'bad' cannot say how long it trains: 1\.5 is no number of steps"),
        ("training_steps", raising(KeyError("x")), r"pass 'bad' cannot say how long it trains: KeyError: 'x' at"),
        (
            "training_evaluations",
            lambda *_: -1,
            r"pass 'bad' cannot say how often it evaluates: -1 is no number of evaluations",
        ),
        ("trains", lambda *_: 1, r"pass 'bad' cannot say whether it trains: 1 is neither True nor False"),
        (
            "needs_calibration",
            lambda *_: None,
            r"pass 'bad' cannot say whether it needs calibration data: None is neither",
        ),
        ("trains", True, r"pass 'bad' cannot say whether it trains: TypeError: .*not callable"),
    ],
)
def test_a_pass_that_cannot_say_how_it_trains_is_named(
    monkeypatch: pytest.MonkeyPatch, method: str, answer: object, message: str
) -> None:
    assert (trains(Bad()), training_steps(Bad(), 8), needs_calibration(Bad())) == (False, 0, False)
    monkeypatch.setattr(Bad, method, answer)
    with pytest.raises(BitlowerError, match=message):
        trains(Bad()), training_steps(Bad(), 8), training_evaluations(Bad(), 8), needs_calibration(Bad())


PLUGIN = """
import os, sys
from dataclasses import dataclass
from bitlower.passes import Pass

{top}

@dataclass(frozen=True)
class Plugged(Pass):
    name = "plugged"
    {fields}

    def run(self, program):
        return False

    {more}
"""


def plugin(folder: Path, *, top: str = "", fields: str = "size: int = 1", more: str = "") -> Path:
    path = folder / "p.py"
    path.write_text(PLUGIN.format(top=top, fields=fields, more=more))
    return path


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("top", "sys.exit(0)", r"the plugin p.py fails to import: SystemExit: 0 at p.py:6$"),
        ("top", "class E(BaseException): pass\nraise E(1)", r"p.py fails to import: E: 1 at p.py:7$"),
        ("top", "raise GeneratorExit", r"p.py fails to import: GeneratorExit"),
        ("fields", "preserves = 5", r"the pass class Plugged preserves 5; `preserves` is a frozenset"),
        ("fields", "requires = frozenset()", r"the pass class Plugged takes no level"),
    ],
)
def test_a_plugin_that_fails_as_it_is_read_is_named(tmp_path: Path, part: str, text: str, message: str) -> None:
    with pytest.raises(BitlowerError, match=message) as info:
        load_plugin(plugin(tmp_path, **{part: text}))
    assert info.value.exit_code == 2
    assert registry.PASSES.loose == {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(0)", r"pass 'plugged' cannot be made: SystemExit: 0 at p.py:\d+"),
        ("{}['gone']", r"pass 'plugged' cannot be made: KeyError: 'gone' at p.py:\d+"),
        ("raise ValueError('too many')", r"pass 'plugged': too many"),
        ("object.__setattr__(self, 'preserves', 5)", r"the pass 'plugged' preserves 5"),
        ("object.__setattr__(self, 'name', None)", r"the pass 'Plugged' has lost its name"),
    ],
)
def test_parameters_that_a_pass_fails_on_are_an_error(tmp_path: Path, body: str, message: str) -> None:
    load_plugin(plugin(tmp_path, more=f"def __post_init__(self):\n        {body}"))
    with pytest.raises(BitlowerError, match=message):
        make_pass("plugged", {"size": 3})
    with pytest.raises(BitlowerError, match=message):
        parse_pipeline("plugged{size=3}")


def test_a_plugin_that_meddles_as_it_is_read_changes_nothing(tmp_path: Path) -> None:
    folder, stream = os.getcwd(), sys.stdout
    load_plugin(
        plugin(tmp_path, top="import torch\ntorch.set_default_dtype(torch.float64)\nos.chdir('/')\nsys.stdout = 1")
    )
    assert (os.getcwd(), sys.stdout, torch.get_default_dtype()) == (folder, stream, torch.float32)
