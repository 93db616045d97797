"""Distillation of hidden states: what leaves each block is to be what leaves the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitlower.passes._machinery.loss import Loss, Step
from bitlower.passes.training._losses._paired import paired

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Hidden(Loss):
    """Squared error of the output of each block, over tokens that are no padding, the mean over blocks.

    As in TernaryBERT (Zhang et al. 2020, §3.2), but for the mean over blocks and the choice how much a token counts.
    """

    name = "hidden"
    needs = frozenset({"hidden", "teacher"})
    tokens: Literal["mean", "unit-norm"] = "mean"
    """``mean``: the mean over all values. ``unit-norm``: the error of each token relative to its energy in the teacher;
    else a few tokens of large norm (attention sinks) own the loss."""
    layers: Literal["all", "last"] = "all"
    """The blocks whose outputs are compared."""

    def value(self, step: Step, memory: object) -> torch.Tensor:
        """The mean over blocks.

        Raises:
            BitlowerError: the model has no repeated blocks, or the teacher's are of another number or width.
        """
        pairs = paired(self.name, step.student.hidden, step.teacher.hidden)[-1 if self.layers == "last" else 0 :]
        return torch.stack([self._of_block(student, teacher, step.mask) for student, teacher in pairs]).mean()

    def _of_block(self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        student, teacher = student[mask].float(), teacher[mask].float()
        error = (student - teacher).square()
        if self.tokens == "mean":
            return error.mean()
        return (error.sum(-1) / teacher.square().sum(-1).clamp(min=_TINY)).mean()
