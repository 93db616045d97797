"""What passes have in common that train one repeated block after another."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bitlower.ir import BitlowerError, Level, Program
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.training._block_data import BlockData, Split, chosen_data
from bitlower.passes.training._block_loop import BlockRow, Outcome, Schedule, improve_blocks
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._teacher import float_reference


@dataclass(frozen=True)
class BlockTraining(Pass, abc.ABC):
    """Lets blocks learn to give what the float model's blocks give; a subclass says what of a block changes and how.

    Needs calibration or training data, part of which is held out: a block whose error there does not fall keeps what it
    had. Only one block has gradients, and only values between two blocks are held.
    """

    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    iterations: int = 200
    """Steps a block."""
    batch: int = 8
    """Sequences a step, drawn at random."""
    learning_rate: float | None = None
    """Of weights, in steps of their grids, at the first step; it falls linearly to 0. None stands for 1/iterations,
    which moves what is rounded by half a step at most."""
    inputs: Literal["quantized", "float"] = "quantized"
    """What a block gets: what the blocks before it give, which are done already, or what the float ones give."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts, by the norm of the block's float output; ``none``: the published mean squared error."""
    held_out: float = 0.125
    """The share of the sequences that are not learned on."""
    memory: int = 2 << 30
    """Bytes of values between blocks that are held in memory; more go to disk."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise BitlowerError(f"{self.name}: {name} is {getattr(self, name)}", hint="it must be at least 1")
        if self.learning_rate is not None and not 0 <= self.learning_rate <= 1:
            raise BitlowerError(f"{self.name}: learning-rate is {self.learning_rate}", hint="it must lie in [0, 1]")
        if not 0 < self.held_out < 1:
            raise BitlowerError(f"{self.name}: held-out is {self.held_out}", hint="it must lie between 0 and 1")

    def data_runs(self, program: Program) -> int:
        """The float and the quantized blocks; learning is not counted."""
        return 2

    def trains(self) -> bool:
        """Block by block."""
        return True

    def training_steps(self, batches: int) -> int:
        """Those of each block."""
        return self.iterations

    @property
    def schedule(self) -> Schedule:
        """How long a block learns."""
        return Schedule(self.iterations, self.batch)

    @property
    def rate(self) -> float:
        """The learning rate of the first step."""
        return 1 / self.iterations if self.learning_rate is None else self.learning_rate

    def prepare(self, program: Program, context: Context, data: Split) -> Split:
        """What is done before the first block, and the data that blocks learn on."""
        return data

    @abc.abstractmethod
    def improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        """Let a block learn; which tensors of the program change, by name."""

    def train(self, program: Program, context: Context) -> tuple[BlockRow, ...]:
        """Train the blocks.

        Raises:
            BitlowerError: fewer than two sequences, a model without repeated blocks, rounded weights without a float
                model to compare with, or values that are not finite.
        """
        data = chosen_data(program, context, self.held_out, self.name)
        found = pairs(program, float_reference(program, context), self.name)
        data = self.prepare(program, context, data)
        walk = Walk(found, data.batches, self.inputs, self.memory, context.work)
        return improve_blocks(program, context, walk, data, self.weighting, self.name, self.improve)
