"""Scans of state-space layers for any number of tokens: over blocks of a fixed size, and from block to block.

transformers goes token by token, in a loop that a trace would unroll, or over blocks so long that a step of one token
costs as much as hundreds. What is computed is the same; sums come in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional

SELECTIVE = ("mamba", "falcon_mamba", "jamba")
"""Architectures whose layers scan with a decay for each channel and state (Mamba: Gu and Dao, 2023, algorithm 2)."""
CHUNKED = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid")
"""Architectures whose layers scan with a decay for each head (Mamba-2: Dao and Gu, 2024, listing 1)."""
_BLOCK = 16
"""Tokens of a block. Within one the work grows with the logarithm, between blocks with the square of their number."""
_before: ContextVar[torch.Tensor | None] = ContextVar("_before", default=None)
"""The recurrent state of the layer that runs: transformers' scan takes none, since it starts from zero."""


def remembered(original: Callable[..., Any], notes: list[str]) -> Any:
    """A cache that tells the next scan which recurrent state it gave out."""

    def get_recurrent_state(self: Any, *place: Any, **named: Any) -> torch.Tensor | None:
        state: torch.Tensor | None = original(self, *place, **named)
        _before.set(state)
        return state

    return get_recurrent_state


def selective(original: Callable[..., Any], notes: list[str]) -> Any:
    """The scan of Mamba, from the state that the cache holds."""

    def scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        dt = dt if delta_bias is None else dt + delta_bias[..., None]
        dt = functional.softplus(dt) if delta_softplus else dt
        length = hidden_states.shape[-1]
        steps, entering, reading = (_blocks(part.transpose(1, 2)) for part in (dt, B, C))
        inputs = steps[..., None] * entering[..., None, :] * _blocks(hidden_states.transpose(1, 2))[..., None]
        before = _before.get() if return_last_state else None  # a run without a cache asks for no last state
        _before.set(None)
        states, last = _linear_recurrence(steps[..., None] * A, inputs, before)
        outputs = (states @ reading[..., None]).squeeze(-1).flatten(1, 2)[:, :length].transpose(1, 2)
        outputs = outputs if D is None else outputs + hidden_states * D[:, None]
        outputs = outputs if z is None else outputs * functional.silu(z)
        return (outputs, last) if return_last_state else outputs

    return scan


def chunked(original: Callable[..., Any], notes: list[str]) -> Any:
    """The scan of Mamba-2 with short blocks, whatever the length that the configuration says."""

    def scan(*tensors: torch.Tensor, chunk_size: int, **options: Any) -> Any:
        return original(*tensors, chunk_size=min(chunk_size, _BLOCK), **options)

    return scan


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens, width]`` as ``[batch, blocks, _BLOCK, width]``; the last block is filled up with 0."""
    rows, length, width = values.shape
    count = (length + _BLOCK - 1) // _BLOCK
    return functional.pad(values, (0, 0, 0, count * _BLOCK - length)).view(rows, count, _BLOCK, width)


def _linear_recurrence(
    decays: torch.Tensor, inputs: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``state = exp(decay) · state + input`` at each token: the states, and the last of them.

    Args:
        decays: ``[batch, blocks, _BLOCK, channels, states]``, not above 0.
        inputs: of the same shape.
        before: ``[batch, channels, states]``, the state before the first token.
    """
    factors, states, shift = decays.exp(), inputs, 1
    while shift < _BLOCK:  # what lies up to twice as far back (Hillis and Steele, 1986)
        pad = (0, 0, 0, 0, shift, 0)
        states = states + factors * functional.pad(states[:, :, :-shift], pad)
        factors = factors * functional.pad(factors[:, :, :-shift], pad, value=1.0)
        shift *= 2
    ends = states[:, :, -1]
    first = torch.zeros_like(ends[:, 0]) if before is None else before
    starts = _between_blocks(decays.sum(2), torch.cat([first[:, None], ends], 1))
    return states + factors * starts[:, :-1, None], starts[:, -1]


def _between_blocks(decays: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The state before each block and after the last, ``[batch, blocks + 1, channels, states]``.

    Args:
        decays: of whole blocks, ``[batch, blocks, channels, states]``.
        states: what came before, and what each block by itself leaves.
    """
    decays = functional.pad(decays, (0, 0, 0, 0, 1, 0))
    places = torch.arange(states.shape[1])
    later = (places[:, None] > places)[..., None, None]
    sums = torch.where(later, decays[:, :, None], 0.0).cumsum(1)
    weights = torch.where(later | (places[:, None] == places)[..., None, None], sums.exp(), 0.0)
    return (weights * states[:, None]).sum(2)
