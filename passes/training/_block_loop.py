"""The loop that improves one block after another, keeps the best, and writes it down; what passes report of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitlower.ir import BitlowerError, Program, get_tensor
from bitlower.ir.charts import BarChart, Chart
from bitlower.ir.trainable import write_tensors
from bitlower.passes._machinery.base import Context
from bitlower.passes._machinery.checkpoints import Stored, load_checkpoint, save_checkpoint
from bitlower.passes._machinery.report import Record, few
from bitlower.passes.training._block_data import BlockData, BlockSplit
from bitlower.passes.training._blocks import Walk
from bitlower.passes.training._part import Part

EVALUATIONS = 20
"""So often is the error on held-out data looked at, in equal distances."""


@dataclass(frozen=True)
class TrainedBlockRow:
    """What became of one block.

    Args:
        block: its path in the model.
        tokens: how many tokens could be drawn from.
        before: the error on held-out tokens at the start: of its output, relative to the float output, squared, tokens
            weighted.
        after: the same in the end.
        step: after how many steps it was least; 0: the block stays as it was.
        notes: what was unusual.
    """

    block: str
    tokens: int
    before: float
    after: float
    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BlockReport(Record):
    """Every block, in order."""

    rows: tuple[TrainedBlockRow, ...]

    def summary(self) -> str:
        """The mean error before and after."""
        before, after = (math.fsum(getattr(row, key) for row in self.rows) for key in ("before", "after"))
        count = len(self.rows)
        return f"error of block outputs {before / count:.4g} → {after / count:.4g} (held-out, mean of {count} blocks)"

    def details(self) -> Iterable[str]:
        """The blocks that stay as they were, and what was unusual."""
        yield from few(f"unchanged: {row.block}" for row in self.rows if not row.step)
        yield from few(note for row in self.rows for note in row.notes)

    def charts(self) -> Iterable[Chart]:
        """The error of every block before it learned and after."""
        names = tuple(row.block for row in self.rows)
        if names:
            before, after = (tuple(getattr(row, key) for row in self.rows) for key in ("before", "after"))
            bars = {"before": before, "after": after}
            yield BarChart("Error of blocks' outputs, held out", "relative squared error", names, bars, "training")


@dataclass(frozen=True)
class Schedule:
    """How long a block learns.

    Args:
        iterations: steps.
        batch: sequences a step.
    """

    iterations: int
    batch: int


@dataclass(frozen=True)
class Outcome:
    """What learning did: the least error, where it was, and the error at the start."""

    before: float
    after: float
    step: int
    notes: tuple[str, ...]


def learn(
    data: BlockData,
    model: nn.Module,
    parameters: Sequence[torch.Tensor],
    update: Callable[[float], None],
    schedule: Schedule,
    generator: torch.Generator,
) -> Outcome:
    """Let a block learn; its parameters are in the end those of the step with the least error on held-out data.

    Args:
        data: what it learns on.
        model: from the block's input and side values to a tuple of its output.
        parameters: what changes.
        update: changes them by their gradients; it gets the share of the learning rate that is left, 1 at the start,
            falling to 0 linearly.
        schedule: how long.
        generator: draws the sequences.

    Raises:
        BitlowerError: the block's values are not finite at the start.
    """
    best, step, notes = data.held_out_error(model), 0, []
    before, best_values = best, [parameter.detach().clone() for parameter in parameters]
    if not math.isfinite(before):
        raise BitlowerError(
            f"{data.part.path}: its calibration values hold NaN or Inf",
            hint="run the float model on the calibration data by itself",
        )
    every = max(1, schedule.iterations // EVALUATIONS)
    for number in range(1, schedule.iterations + 1 if parameters else 1):
        for parameter in parameters:
            parameter.grad = None
        if not math.isfinite(data.backward(model, data.draw(schedule.batch, generator))):
            notes.append(f"{data.part.path}: the loss was not finite at step {number}, where learning ended")
            break
        update(1 - (number - 1) / schedule.iterations)
        if number % every == 0 or number == schedule.iterations:
            error = data.held_out_error(model)
            if error < best:
                best, step, best_values = error, number, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best_values, strict=True):
            parameter.copy_(value)
    return Outcome(before, best, step, tuple(notes))


Improve = Callable[[BlockData, torch.Generator], tuple[Outcome, Mapping[str, torch.Tensor]]]
"""Lets a block learn and says which tensors of the program change, by name."""


def improve_blocks(
    program: Program, context: Context, walk: Walk, data: BlockSplit, weighting: str, name: str, improve: Improve
) -> tuple[TrainedBlockRow, ...]:
    """Improve one block after another, or read what became of it from a checkpoint, and write it into ``program``.

    Args:
        program: what the walk goes through.
        context: of the pass ``name``.
        walk: over ``data.batches``.
        data: what to learn on and what to hold out.
        weighting: how much a token counts.
        name: for the random generators and the display.
        improve: what is done to each block.
    """
    rows = []
    for step in context.track(walk, name):
        key = f"{step.index}/{step.part.path}"
        stored = load_checkpoint(context.work, key)
        if stored is None:
            block = BlockData(step, data, weighting)
            outcome, tensors = improve(block, context.generator(f"{name}/{key}"))
            stored = Stored({k: v.contiguous().clone() for k, v in tensors.items()}, [_row(block, outcome)])
            save_checkpoint(context.work, key, stored)
            del block
        write_tensors(program.module, stored.tensors)
        [row] = stored.rows
        rows.append(TrainedBlockRow(**row | {"notes": tuple(row["notes"])}))
        step.part.release()
    return tuple(rows)


def _row(block: BlockData, outcome: Outcome) -> dict[str, Any]:
    return {
        "block": block.part.path,
        "tokens": block.tokens,
        "before": outcome.before,
        "after": outcome.after,
        "step": outcome.step,
        "notes": [*_stays(block.part), *outcome.notes],
    }


def _stays(part: Part) -> list[str]:
    """What a block could not change without changing something else."""
    parameters = [name for name in part.shared() if isinstance(get_tensor(part.program.module, name), nn.Parameter)]
    return [f"{name} is read outside {part.path} too, and stays" for name in sorted(parameters)]
