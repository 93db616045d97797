"""Distillation of attention scores: each token is to look where it does in the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitlower.passes._machinery.loss import Loss, Step
from bitlower.passes.training._losses._paired import paired


@dataclass(frozen=True)
class Attention(Loss):
    """Squared error of the attention scores before the softmax, the mean over pairs of tokens, heads and blocks.

    As in TernaryBERT (Zhang et al. 2020, §3.2), but for the mean over blocks. Pairs with padding do not count, nor
    those that a mask shuts: where the teacher's score is ``-inf`` or the mask's lowest number.
    """

    name = "attention"
    needs = frozenset({"attention", "teacher"})

    def value(self, step: Step, memory: object) -> torch.Tensor:
        """The mean over blocks.

        Raises:
            BitlowerError: the model has no attention, or the teacher's is of another number or shape.
        """
        pairs = paired(self.name, step.student.attention, step.teacher.attention)
        there = (step.mask.unsqueeze(2) & step.mask.unsqueeze(1)).unsqueeze(1)
        return torch.stack([_of_block(student, teacher, there) for student, teacher in pairs]).mean()


def _of_block(student: torch.Tensor, teacher: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """The mean over what counts; scores are ``[batch, heads, sequence, sequence]``, ``there`` broadcasts over them."""
    counted = there & (teacher > torch.finfo(teacher.dtype).min / 2)
    return (student[counted].float() - teacher[counted].float()).square().mean()
