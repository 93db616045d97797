"""What a loss is: a frozen dataclass whose fields are its parameters, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.plugins.kinds import check_bounds

NEEDS = frozenset({"hidden", "attention", "teacher", "labels"})
"""What a loss may look at: values of the student (and of the teacher where that is named too), the teacher, labels."""


@dataclass(frozen=True)
class Values:
    """What a model computes on a batch: of the student with gradients, of the teacher without.

    Only what the losses at hand need is filled in (:attr:`Loss.needs`).

    Args:
        hidden: the value that leaves each repeated block, ``[batch, sequence, channels]`` each, in order.
        attention: the scores of each attention after scaling and before the softmax, not masked but for later tokens
            of a causal model, which have −∞; ``[batch, heads, sequence, sequence]`` each, in order.
    """

    hidden: tuple[torch.Tensor, ...] = ()
    attention: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Step:
    """A batch and what student and teacher make of it.

    Args:
        student: its values; gradients flow through them.
        teacher: those of the float model, or of another one; empty where no loss needs a teacher.
        batch: the model's inputs by name.
        mask: which tokens are no padding, ``[batch, sequence]``, bool.
        labels: what the training data say, ``[batch]``: class indices (int64) or values (float32); None without any.
        training: False while held-out data are evaluated: a loss must not change its memory then.
        generator: the step's own randomness; it depends on the seed and the step alone.
    """

    student: Values
    teacher: Values
    batch: Batch
    mask: torch.Tensor
    labels: torch.Tensor | None
    training: bool
    generator: torch.Generator


@dataclass(frozen=True)
class Loss:
    """A term of the objective that training minimizes; derive from it or from :class:`LogitsLoss`.

    Decorate the class with ``@dataclass(frozen=True)``, set ``name`` and ``needs``, and write ``value``. Parameters
    are of the types that a pass's parameters may have, with defaults.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of ``hidden``, ``attention`` (both of the student), ``teacher`` and ``labels``."""
    weight: Annotated[float, Interval(ge=0, le=1e6)] = 1.0
    """What the term is multiplied by in the sum of all losses."""

    def __post_init__(self) -> None:
        """Hold the parameters to their bounds.

        Raises:
            BitlowerError: one lies outside.
        """
        check_bounds(self, f"loss {self.name!r}")

    def memory(self, program: Program) -> dict[str, torch.Tensor]:
        """Tensors that the loss keeps from step to step; they are part of checkpoints. None by default."""
        return {}

    def value(self, step: Step, memory: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch: a scalar, as a rule the mean over what is no padding.

        ``memory`` holds what :meth:`memory` gave; it is changed in place, and only if ``step.training``.
        """
        raise BitlowerError(
            f"{type(self).__name__} defines no `value`", hint="write `def value(self, step, memory) -> torch.Tensor`"
        )


@dataclass(frozen=True)
class LogitsLoss(Loss):
    """A loss of each row of logits by itself, so that a large vocabulary can be taken in chunks of rows.

    A row is a text for a model that returns one vector a text, and a token that is no padding for one that returns a
    vector a token.
    """

    def rows(self, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
        """The loss of each row, ``[rows]``; the mean over all rows of a batch is minimized.

        Args:
            student: ``[rows, classes]``, float32, with gradients.
            teacher: the same of the teacher; None unless ``needs`` holds ``teacher``.
            labels: ``[rows]``; for a causal language model the token that follows, and rows without one are left
                out. None unless ``needs`` holds ``labels``.
        """
        raise BitlowerError(
            f"{type(self).__name__} defines no `rows`", hint="write `def rows(self, student, teacher, labels)`"
        )


Memories = dict[str, dict[str, torch.Tensor]]
"""What each loss keeps, by its name."""


@dataclass(frozen=True)
class Objective:
    """The losses of one training, each name once."""

    losses: tuple[Loss, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        names = [loss.name for loss in self.losses]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise BitlowerError(f"the loss {twice!r} is given twice", hint="keep one of them and set its weight")

    @property
    def needs(self) -> frozenset[str]:
        """What any of the losses needs."""
        return frozenset().union(*(loss.needs for loss in self.losses))
