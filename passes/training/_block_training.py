"""What passes have in common that train one repeated block after another."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Interval

from bitlower.ir import Level, Program
from bitlower.ir.charts import Topic
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.workload import BlockSchedule
from bitlower.passes.training._block_data import TOKENS, BlockData, BlockSplit, chosen_data
from bitlower.passes.training._block_loop import EVALUATIONS, Outcome, Schedule, TrainedBlockRow, improve_blocks
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._teacher import float_reference


@dataclass(frozen=True)
class BlockTraining(Pass, abc.ABC):
    """Lets blocks learn to give what the float model's blocks give; a subclass says what of a block changes and how.

    Needs calibration or training data, part of which is held out: a block whose error there does not fall keeps what it
    had. Only one block has gradients, and only values between two blocks are held.
    """

    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    draws: ClassVar[frozenset[Topic]] = frozenset({"training"})
    contract: ClassVar[Contract] = Contract.LOSSY
    rewrites_weights: ClassVar[bool] = True
    keeps_sizes: ClassVar[bool] = True
    iterations: Annotated[int, Ge(1)] = 200
    """Steps a block."""
    batch: Annotated[int, Ge(1)] = 8
    """Sequences a step, drawn at random."""
    learning_rate: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Of weights, in steps of their grids, at the first step; it falls linearly to 0. None stands for 1/iterations,
    which moves what is rounded by half a step at most."""
    inputs: Literal["quantized", "float"] = "quantized"
    """What a block gets: what the blocks before it give, which are done already, or what the float ones give."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts, by the norm of the block's float output; ``none``: the published mean squared error."""
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.125
    """The share of the sequences that are not learned on."""
    memory: Annotated[int, Ge(0)] = 2 << 30
    """Bytes of values between blocks that are held in memory; more go to disk."""

    def data_runs(self, program: Program) -> int:
        """The float and the quantized blocks; learning is not counted."""
        return 2

    def trains(self) -> bool:
        """Block by block."""
        return True

    def rehearsed(self) -> Self:
        """Two iterations a block."""
        return replace(self, iterations=min(self.iterations, 2))

    def training_steps(self, batches: int) -> int:
        """Those of each block."""
        return self.iterations

    def block_schedule(self) -> BlockSchedule:
        """As the parameters say."""
        return BlockSchedule(self.iterations, self.batch, self.held_out, EVALUATIONS, TOKENS, self.memory)

    @property
    def schedule(self) -> Schedule:
        """How long a block learns."""
        return Schedule(self.iterations, self.batch)

    @property
    def rate(self) -> float:
        """The learning rate of the first step."""
        return 1 / self.iterations if self.learning_rate is None else self.learning_rate

    def prepare(self, program: Program, context: Context, data: BlockSplit) -> BlockSplit:
        """What is done before the first block, and the data that blocks learn on."""
        return data

    @abc.abstractmethod
    def improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        """Let a block learn; which tensors of the program change, by name."""

    def train(self, program: Program, context: Context) -> tuple[TrainedBlockRow, ...]:
        """Train the blocks.

        Raises:
            BitlowerError: fewer than two sequences, a model without repeated blocks, rounded weights without a float
                model to compare with, or values that are not finite.
        """
        data = chosen_data(program, context, self.held_out, self.name)
        block_pairs = pairs(program, float_reference(program, context), self.name)
        data = self.prepare(program, context, data)
        walk = Walk(block_pairs, data.batches, self.inputs, self.memory, context.work)
        return improve_blocks(program, context, walk, data, self.weighting, self.name, self.improve)
