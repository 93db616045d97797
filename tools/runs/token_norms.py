"""How large an activation is at each token: few tokens of great norm are what per-tensor ranges suffer from.

Attention sinks and massive activations show as a first token, or some token, whose norm is many times the median
(Xiao et al., 2023, "Efficient Streaming Language Models with Attention Sinks", §3.1; Sun et al., 2024, "Massive
Activations in Large Language Models", §2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bitlower.ir import Batch
from bitlower.ir.digits import significant
from bitlower.ir.tokens import token_dim, token_mask
from bitlower.tools.runs.spread import DIGITS, spread

FIRST = 16
"""Places in a text whose mean norm is known."""


@dataclass
class TokenNorms:
    """Euclidean norms of an activation's rows, one for each token that is no padding."""

    norms: list[torch.Tensor] = field(default_factory=list)
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(FIRST, dtype=torch.float64))
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(FIRST, dtype=torch.int64))

    def add(self, value: torch.Tensor, shape: tuple[int | str, ...], batch: Batch) -> None:
        """Take a value laid out ``[batch, tokens, width]``; others are left out.

        Args:
            value: floats.
            shape: its sizes, as its type has them.
            batch: what it was computed from; its mask says what is padding.
        """
        dim = token_dim(shape)
        if len(shape) != 3 or shape[1] != dim or not isinstance(shape[2], int):
            return
        norms = value.detach().float().norm(dim=-1)
        mask = token_mask(batch, dim)
        mask = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
        places = mask.long().cumsum(1) - 1
        early = mask & (places < FIRST)
        self.norms.append(norms[mask])
        self.sums.index_add_(0, places[early], norms[early].double())
        self.counts += torch.bincount(places[early], minlength=FIRST)

    def to_dict(self) -> dict[str, Any] | None:
        """``count`` and ``sorted`` norms, and ``first``, the mean norm at the first places of texts; None for none."""
        if not self.norms:
            return None
        seen = self.counts > 0
        means = (self.sums[seen] / self.counts[seen]).tolist()
        return {**spread(torch.cat(self.norms)), "first": [significant(mean, DIGITS) for mean in means]}
