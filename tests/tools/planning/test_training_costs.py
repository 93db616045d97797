"""What training takes: by hand, and against the tensors that autograd really keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bitlower import Context, Level, Pass, Program
from bitlower.frontends.tokenize import windows
from bitlower.ir.blocks import blocks
from bitlower.passes import PassManager, make_pass, parse_pipeline
from bitlower.passes.training.lkd import Lkd
from bitlower.tools.data.batches import Data
from bitlower.tools.planning import costs
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import Plan, make_plan
from bitlower.tools.planning.training_costs import Lesson

LENGTH = 24


@dataclass(frozen=True)
class Learn(Pass):
    """Trains, if it did."""

    name: ClassVar[str] = "learn"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    steps: int = 0
    epochs: int = 0
    evaluations: int = 0

    def trains(self) -> bool:
        return True

    def training_steps(self, batches: int) -> int:
        return self.steps or self.epochs * batches

    def training_evaluations(self, batches: int) -> int:
        return self.evaluations

    def run(self, program: Program, context: Context) -> bool:
        return False


def plan(program: Program, pass_: Pass | None, lesson: Lesson | None) -> Plan:
    passes = (*parse_pipeline("clean,quantize{scheme=W8A8}"), make_pass("calibrate"), *((pass_,) if pass_ else ()))
    return make_plan(program.clone(), (*passes, make_pass("lower-integer")), Load(8, 16), lesson=lesson)


def lesson_of(program: Program, rows: int, batches: int = 4) -> Lesson:
    tokens = torch.randint(5, 30, (rows * batches, LENGTH), generator=torch.Generator().manual_seed(0))
    training = windows(program, tokens, batch_size=rows)
    labelled = [{**batch, "labels": torch.zeros(rows, dtype=torch.int64)} for batch in training]
    lesson = Lesson.of(Data(training=labelled, held_out=training[:1]))
    assert lesson
    return lesson


def test_a_lesson_is_counted_from_its_batches(bert_program: Program) -> None:
    lesson = lesson_of(bert_program, 6)
    assert (lesson.batches, lesson.rows, lesson.length, lesson.tokens, lesson.held_out_tokens) == (4, 6, 24, 144, 144)
    assert lesson.bytes == 8 * (4 * (3 * 144 + 6) + 3 * 144)
    calibrated = Lesson.of(Data(calibration=[{"x": torch.ones(5, 7)}] * 3))
    assert calibrated == Lesson(3, 5, 1, 5.0, 0, 3 * 5 * 7 * 4)
    assert Lesson.of(Data()) is None


@pytest.mark.parametrize(("pass_", "steps"), [(Learn(steps=250, evaluations=4), 250), (Learn(epochs=3), 12)])
def test_the_time_of_steps_by_hand(
    bert_program: Program, bert: Path, monkeypatch: pytest.MonkeyPatch, pass_: Learn, steps: int
) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(costs, "_flop_rate", lambda: 1e6)
    lesson = lesson_of(bert_program, 6)
    weights = [m.weight.numel() for m in AutoModel.from_pretrained(bert).modules() if isinstance(m, torch.nn.Linear)]
    tokens = 4 * steps * 144 + (4 * 144 + 144) + pass_.evaluations * 144
    still = plan(bert_program, Learn(), lesson).seconds
    assert plan(bert_program, pass_, lesson).seconds - still == pytest.approx(2 * sum(weights) * tokens / 0.7e6)


@pytest.mark.parametrize(("batch", "sequences"), [(8, 8), (64, 24)])
def test_training_block_by_block_by_hand(
    bert_program: Program, bert: Path, monkeypatch: pytest.MonkeyPatch, batch: int, sequences: int
) -> None:
    """Steps of ``batch`` of the 24 sequences of 24 tokens, and 21 looks at a quarter of them."""
    from transformers import AutoModel

    monkeypatch.setattr(costs, "_flop_rate", lambda: 1e6)
    lesson = lesson_of(bert_program, 6)
    model = AutoModel.from_pretrained(bert)
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens = 4 * 50 * sequences * 24 + 21 * 0.25 * 24 * 24
    short, long = (Lkd(iterations=count, batch=batch, held_out=0.25) for count in (1, 51))
    more = plan(bert_program, long, lesson).seconds - plan(bert_program, short, lesson).seconds
    assert more == pytest.approx(2 * sum(weights) * 4 * 50 * sequences * 24 / 0.7e6)
    assert lesson.block_tokens(Lkd(iterations=50, batch=batch, held_out=0.25).block_schedule()) == tokens


def test_memory_of_training_block_by_block_is_that_of_one_block(bert_program: Program) -> None:
    passes = parse_pipeline("clean,quantize{scheme=W8A8},calibrate")
    batches = [windows(bert_program, torch.randint(5, 30, (4, LENGTH)), batch_size=4)[0]]
    placed = PassManager(passes).run(bert_program, Context(calibration=batches, evaluation=batches))
    lesson, count = Lesson(10, 4, LENGTH, 4.0 * LENGTH, bytes=99), len(blocks(placed.module))
    small, large = (lesson.block_memory(Lkd().block_schedule(), placed, linears, 0) for linears in (0, 1000 * count))
    assert large - small == 6 * 1000
    between = 12 * 32 * 40 * LENGTH
    assert lesson.block_memory(Lkd().block_schedule(), placed, 0, 32) - small == between
    assert lesson.block_memory(Lkd(memory=1000).block_schedule(), placed, 0, 32) - small == 1000
    half = lesson.block_memory(Lkd(batch=4).block_schedule(), placed, 0, 0) - 99
    assert small - 99 == pytest.approx(2 * half, abs=2)


def test_without_data_of_its_own_a_pass_trains_on_batches_as_of_calibration(
    bert_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_flop_rate", lambda: 1e6)
    given = Lesson(2, 4, 16, 64.0)
    passes = (*parse_pipeline("clean,quantize{scheme=W8A8}"), Learn(steps=9), make_pass("lower-integer"))
    told, guessed = (make_plan(bert_program.clone(), passes, Load(8, 16, 4), lesson=x) for x in (given, None))
    assert guessed.seconds == pytest.approx(told.seconds)
    assert guessed.peak_bytes == told.peak_bytes


def test_a_pass_that_trains_keeps_sizes(bert_program: Program) -> None:
    lesson = lesson_of(bert_program, 6)
    without, trained = plan(bert_program, None, lesson), plan(bert_program, Learn(steps=1), lesson)
    assert trained.notes == without.notes
    assert trained.file_bytes == without.file_bytes
    assert trained.peak_bytes > without.peak_bytes


@pytest.mark.parametrize("name", ["bert_program", "llama_program"])
def test_the_values_of_a_batch_are_those_that_autograd_keeps(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    batches = [windows(program, torch.randint(5, 30, (rows, LENGTH)), batch_size=rows)[0] for rows in (8, 32)]
    passes = parse_pipeline("clean,quantize{scheme=W8A8},calibrate")
    placed = PassManager(passes).run(program, Context(calibration=batches[:1], evaluation=batches[:1]))
    module, kept = placed.trainable_module(), []
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    for batch in batches:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters and tensor.is_floating_point():
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = module(**batch)
        kept.append(sum(found.values()))
        del outputs
    foreseen = [Lesson(1, rows, LENGTH, 1.0).memory(program, placed) for rows in (8, 32)]
    assert foreseen[1] - foreseen[0] == pytest.approx(kept[1] - kept[0], rel=0.5)
