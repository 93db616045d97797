"""What passes are told about a run that is predicted, and what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The linear layers of a program, and the data that pass through them.

    Args:
        tokens: of all calibration data.
        widths: channels of each activation that linear layers read, each activation once.
        shapes: ``[outputs, inputs]`` of each weight.
    """

    tokens: int
    widths: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlockSchedule:
    """How a pass trains one block after another.

    Args:
        iterations: steps for each block.
        batch: sequences for each step.
        held_out: the share of the sequences that are not learned on.
        evaluations: how often the held-out error is looked at, the start left out.
        step_tokens: the most tokens that go through a block at a time.
        memory: bytes of values between blocks that are held in memory.
    """

    iterations: int
    batch: int
    held_out: float
    evaluations: int
    step_tokens: int
    memory: int
