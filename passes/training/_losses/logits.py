"""Distillation of logits: the student's distribution is to be the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch.nn import functional

from bitlower.passes._machinery.loss import LogitsLoss


@dataclass(frozen=True)
class Logits(LogitsLoss):
    """Kullback-Leibler divergence of the student's distribution from the teacher's, at a temperature.

    ``T² · Σ_v p_v · (log p_v − log q_v)`` with ``p = softmax(teacher / T)`` and ``q = softmax(student / T)`` (Hinton et
    al. 2015, §2; ``T²`` keeps the size of gradients). At ``T = 1`` this is QuantGPT's soft cross-entropy (Tao et al.
    2022, §3.2) less the teacher's entropy, which no parameter changes: the gradients are the same. A head of one value
    (regression) has no distribution; there it is the squared difference.
    """

    name = "logits"
    needs = frozenset({"teacher"})
    temperature: Annotated[float, Interval(gt=0, le=1000)] = 1.0
    """T; above 1 small probabilities count more."""

    def rows(self, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor:
        """The divergence of each row, ``[rows]``."""
        assert teacher is not None
        if student.shape[-1] == 1:
            return (student - teacher).square().sum(-1)
        ours, wanted = (functional.log_softmax(logits / self.temperature, -1) for logits in (student, teacher))
        divergence = functional.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1)
        return divergence * self.temperature**2
