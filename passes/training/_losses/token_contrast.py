"""Token-level contrastive distillation: each token's representation is told from those of other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch.nn import functional

from bitlower.ir import BitlowerError, Program
from bitlower.ir.dataflow import vocabularies
from bitlower.ir.tokens import token_ids
from bitlower.passes._machinery.loss import Loss, Step
from bitlower.passes.training._forward import hidden_nodes
from bitlower.passes.training._losses._paired import paired
from bitlower.passes.training._memory_bank import MemoryBank


@dataclass(frozen=True)
class TokenContrast(Loss):
    """QuantGPT's contrastive distillation of the last block's output (Tao et al. 2022, §3.2, eq. 3 to 5).

    Of an encoder-decoder it is the output of the decoder, as in the paper's QuantBART.

    ``q`` is the student's representation of a token, blended with what a memory bank keeps of its id, ``h`` the
    teacher's, ``s`` the cosine. Beside itself each token i is compared with its negatives, tokens of other ids::

        −log (exp(s(q_i, h_i) / τ) / Σ_{j ∈ {i} ∪ negatives} exp(s(q_i, h_j) / τ))

    plus the same with student and teacher exchanged; the mean over tokens that are no padding. The first time that an
    id is met, the bank takes the value itself. The paper has it beside `logits`, with a weight of 0.1. Momentum,
    temperature and the number of negatives are not in the paper's text.
    """

    name = "token-contrast"
    needs = frozenset({"hidden", "teacher"})
    weight: Annotated[float, Interval(ge=0, le=1e6)] = 0.1
    """What the term is multiplied by in the sum of all losses."""
    negatives: Literal["positions", "quantized", "vocabulary"] = "positions"
    """``positions``: other tokens of the sequence, in the other model. ``quantized``: the same tokens, in the student,
    for both directions. ``vocabulary``: ids that the bank has met, as the bank has them."""
    count: Annotated[int, Ge(1)] = 20
    """How many negatives a token has, drawn anew at each step; all there are where they are fewer."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """How much of ``q`` comes from the bank."""
    temperature: Annotated[float, Interval(gt=0, le=100)] = 0.1
    """τ; the smaller, the more the nearest negatives count."""

    def memory(self, program: Program) -> dict[str, torch.Tensor]:
        """The bank, of the size of the vocabulary and as wide as what leaves the last block.

        Raises:
            BitlowerError: the model has no repeated blocks, or no table that token ids index.
        """
        sizes = [int(shape[0]) for _, shape in vocabularies(program.graph)]
        hidden = hidden_nodes(program)
        if not sizes or not hidden:
            raise BitlowerError(
                f"the loss {self.name!r} needs token ids (`input_ids`) and repeated blocks",
                hint="this model has none: use other losses",
            )
        return MemoryBank.empty(max(sizes), int(hidden[-1].meta["type"].shape[-1]))

    def value(self, step: Step, memory: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, whose representations then go into the bank if the step trains."""
        pairs = paired(self.name, step.student.hidden[-1:], step.teacher.hidden[-1:])
        bank, there, ids = MemoryBank.of(memory), step.mask, _ids(step)[step.mask]
        student, teacher = (value.masked_fill(~there.unsqueeze(-1), 0.0).float() for value in pairs[0])
        blended = bank.blend(ids, student[there], self.momentum)
        q = torch.zeros_like(student).masked_scatter(there.unsqueeze(-1), functional.normalize(blended, dim=-1))
        h = functional.normalize(teacher, dim=-1)
        if self.negatives == "vocabulary":
            loss = self._against_the_bank(q[there], h[there], ids, bank, step.generator)
        else:
            loss = self._against_the_sequence(q, h, step)[there]
        if step.training:
            bank.write(ids, blended)
        return loss.mean()

    def _against_the_sequence(self, q: torch.Tensor, h: torch.Tensor, step: Step) -> torch.Tensor:
        """The loss of each token, ``[batch, sequence]``; of ``q`` and ``h``, ``[batch, sequence, channels]``."""
        ids = _ids(step)
        allowed = step.mask.unsqueeze(1) & (ids.unsqueeze(1) != ids.unsqueeze(2))
        drawn = self._draw(allowed, step.generator)
        own = (q * h).sum(-1)
        others = {"positions": h, "quantized": q}[self.negatives]
        return self._contrast(own, q @ others.mT, drawn) + self._contrast(own, h @ q.mT, drawn)

    def _against_the_bank(
        self, q: torch.Tensor, h: torch.Tensor, ids: torch.Tensor, bank: MemoryBank, generator: torch.Generator
    ) -> torch.Tensor:
        """The loss of each token, ``[tokens]``; one draw of ids serves the whole batch."""
        known = bank.seen.nonzero().squeeze(-1)
        chosen = known[torch.randperm(len(known), generator=generator)[: self.count].to(known.device)]
        others = functional.normalize(bank.rows[chosen], dim=-1)
        own, drawn = (q * h).sum(-1), chosen != ids.unsqueeze(-1)
        return self._contrast(own, q @ others.mT, drawn) + self._contrast(own, h @ others.mT, drawn)

    def _draw(self, allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """At most ``count`` of what is allowed along the last axis, each as likely as the other."""
        noise = torch.rand(allowed.shape, generator=generator).to(allowed.device).masked_fill(~allowed, -1.0)
        best = noise.topk(min(self.count, allowed.shape[-1]), dim=-1).indices
        return torch.zeros_like(allowed).scatter(-1, best, True) & allowed

    def _contrast(self, own: torch.Tensor, others: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """``−log (exp(own / τ) / (exp(own / τ) + Σ_drawn exp(others / τ)))`` along the last axis of ``others``."""
        others = others.masked_fill(~drawn, -torch.inf)
        both = torch.cat([own.unsqueeze(-1), others], -1) / self.temperature
        return both.logsumexp(-1) - both[..., 0]


def _ids(step: Step) -> torch.Tensor:
    """The ids of the tokens, ``[batch, sequence]``; of an encoder-decoder, of its target."""
    ids = token_ids(step.batch)
    assert ids is not None, "the bank is made for models with token ids"
    return ids
