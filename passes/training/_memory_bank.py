"""QuantGPT's memory bank: a slowly moving representation of each token of the vocabulary (Tao et al. 2022, §3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MemoryBank:
    """A view of tensors that outlive steps; :meth:`write` changes them in place.

    Args:
        rows: the representation of each token id, ``[vocabulary, channels]``, float32.
        seen: which ids were written at least once, ``[vocabulary]``, bool.
    """

    rows: torch.Tensor
    seen: torch.Tensor

    @staticmethod
    def empty(vocabulary: int, channels: int) -> dict[str, torch.Tensor]:
        """The tensors of a bank that has seen nothing."""
        return {"rows": torch.zeros(vocabulary, channels), "seen": torch.zeros(vocabulary, dtype=torch.bool)}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> MemoryBank:
        """The bank in ``tensors``."""
        return cls(tensors["rows"], tensors["seen"])

    def blend(self, ids: torch.Tensor, values: torch.Tensor, momentum: float) -> torch.Tensor:
        """``momentum · bank[id] + (1 − momentum) · value``, of which the second part alone has gradients.

        An id that was never written counts as if it held the value itself, so that the value comes out.

        Args:
            ids: token ids, ``[tokens]``.
            values: their representations in this batch, ``[tokens, channels]``.
            momentum: the share of the past.
        """
        past = torch.where(self.seen[ids].unsqueeze(-1), self.rows[ids], values.detach())
        return momentum * past + (1 - momentum) * values

    def write(self, ids: torch.Tensor, blended: torch.Tensor) -> None:
        """Keep what :meth:`blend` gave; of an id that occurs several times, the mean."""
        unique_ids, where = torch.unique(ids, return_inverse=True)
        counts = torch.bincount(where, minlength=len(unique_ids)).unsqueeze(-1)
        sums = torch.zeros(len(unique_ids), blended.shape[-1], dtype=blended.dtype, device=blended.device)
        self.rows[unique_ids] = sums.index_add_(0, where, blended.detach()) / counts
        self.seen[unique_ids] = True
