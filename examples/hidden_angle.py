"""A loss of one's own: the angle between the student's and the teacher's last hidden states."""

from dataclasses import dataclass

import torch

from bitlower.passes.training import Loss


@dataclass(frozen=True)
class HiddenAngle(Loss):
    """One less the cosine between student and teacher, the mean over tokens."""

    name = "hidden-angle"
    needs = frozenset({"hidden", "teacher"})

    def value(self, step, memory):
        """The loss of a batch; padding is left out."""
        student, teacher = (values.hidden[-1][step.mask] for values in (step.student, step.teacher))
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean()
