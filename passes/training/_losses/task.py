"""The task's own loss, against labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.loss import LogitsLoss


@dataclass(frozen=True)
class Task(LogitsLoss):
    """Cross-entropy with the labels; of a language model, with the tokens that follow; of values, the squared error."""

    name = "task"
    needs = frozenset({"labels"})

    def rows(self, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
        """The loss of each row, ``[rows]``; integer labels are classes, others values.

        Raises:
            BitlowerError: the labels do not fit the head.
        """
        assert labels is not None
        classes = student.shape[-1]
        if labels.is_floating_point():
            if classes != 1:
                raise BitlowerError(
                    f"labels are numbers, but the head gives {classes} values a text",
                    hint="classes are whole numbers from 0 on",
                )
            return (student.squeeze(-1) - labels).square()
        wrong = (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            raise BitlowerError(
                f"the label {int(labels[wrong][0])} does not fit a head of {classes} classes",
                hint=f"labels run from 0 to {classes - 1}",
            )
        return functional.cross_entropy(student, labels, reduction="none")
