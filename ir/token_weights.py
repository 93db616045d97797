"""How much a token counts in a mean over tokens, by its norm.

A transformer has tokens of a hundred times the norm of the others (attention sinks). They own an unweighted mean,
although a normalization follows that makes all tokens equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

CLIP = 2.0
"""``clipped-norm`` lets a token count for at most this many times the median ``‖x‖²``."""
_TINY = torch.finfo(torch.float32).tiny

Weighting = Callable[[torch.Tensor], torch.Tensor]
"""From ``‖x_t‖²`` of the tokens of one call, ``[tokens]``, to their weights; the norms are above zero."""


def _published(norms: torch.Tensor) -> torch.Tensor:
    """Every token counts as its norm says: ``Σ x xᵀ`` (Frantar et al. 2022)."""
    return torch.ones_like(norms)


def _unit_norm(norms: torch.Tensor) -> torch.Tensor:
    """``1 / ‖x‖²``: every token counts the same, whatever its norm."""
    return 1 / norms


def _root_norm(norms: torch.Tensor) -> torch.Tensor:
    """``1 / ‖x‖``: half way between the published weighting and unit norms."""
    return norms.rsqrt()


def _clipped_norm(norms: torch.Tensor) -> torch.Tensor:
    """``min(1, CLIP · median ‖x‖² / ‖x‖²)``: only tokens of unusual norm are scaled down; the median is of the call."""
    return (CLIP * norms.median() / norms).clamp_(max=1.0)


WEIGHTINGS: dict[str, Weighting] = {
    "none": _published,
    "unit-norm": _unit_norm,
    "root-norm": _root_norm,
    "clipped-norm": _clipped_norm,
}


def token_weights(norms: torch.Tensor, weighting: str) -> torch.Tensor:
    """How much each token counts, by ``‖x_t‖²``, 1 on average; those of zeros do not count.

    Args:
        norms: ``[tokens]``.
        weighting: one of ``WEIGHTINGS``.
    """
    used = norms > _TINY
    weights = torch.zeros_like(norms)
    weights[used] = WEIGHTINGS[weighting](norms[used])
    return weights / weights.mean() if bool(used.any()) else weights
