"""Places of transformers that make a number of a size, written so that the size stays open while a model is traced.

Each computes what the original does, bit for bit at every size; the originals come back when the trace is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bitlower.frontends import _longformer, _scans, _states

Factory = Callable[[Any, list[str]], Any]
"""Makes a replacement of an original, and adds to the notes what a user should know when it runs."""


@contextmanager
def open_sizes() -> Iterator[list[str]]:
    """Put the replacements in place for a while, in those modules of transformers that are loaded; their notes."""
    notes: list[str] = []
    with ExitStack() as stack:
        for module, owner, name, factory in _PLACES:
            if module in sys.modules:
                place = getattr(sys.modules[module], owner) if owner else sys.modules[module]
                stack.enter_context(_replaced(place, name, factory, notes))
        yield notes


@contextmanager
def _replaced(owner: Any, name: str, factory: Factory, notes: list[str]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, factory(original, notes))
    try:
        yield
    finally:
        setattr(owner, name, original)


@dataclass(frozen=True)
class _Positions:
    """Positions in a row: ``first``, then ``offset + step · i`` for i from 1 to ``count - 1``."""

    first: Any
    offset: Any
    step: int
    count: Any

    @property
    def last(self) -> Any:
        return self.offset + self.step * (self.count - 1)

    def pooled(self, block: int, *, separate: bool, truncate: bool) -> _Positions:
        """Every second one, as Funnel pools them: the first stays by itself where it is the class token."""
        if not separate:
            return _Positions(self.first, self.offset, 2 * self.step, (self.count + 1) // 2)
        count = 1 + ((self.count - 1) // 2 if truncate else self.count // 2)
        return _Positions(1 - 2**block, self.offset - self.step, 2 * self.step, count)

    def distances(self, queries: _Positions, stride: int, shift: int) -> torch.Tensor:
        """All distances from ``queries`` to these, the farthest first, int64."""
        start = queries.first - self.first + shift * queries.count * stride
        return torch.arange(start, queries.first - self.last - 1, -stride, dtype=torch.long)


def _funnel_positions(original: Any, notes: list[str]) -> Any:
    """Relative positions of Funnel Transformer (Dai et al., 2020, appendix A.2.1) without lists of all positions."""

    def get_position_embeds(self: Any, seq_len: Any, dtype: torch.dtype, device: torch.device) -> Any:
        config = self.config
        if config.attention_type == "factorized":
            return original(self, seq_len, dtype, device)
        half = torch.arange(0, config.d_model // 2, 1.0, dtype=torch.int64, device=device).to(dtype)
        frequencies = 1 / (10000 ** (half / (config.d_model // 2)))
        embed = partial(_sinusoids, frequencies)
        keys = _Positions(0, 0, 1, seq_len)
        embeddings = []
        for block in range(config.num_blocks):
            pooling, queries = None, keys
            if block:
                queries = keys.pooled(block, separate=config.separate_cls, truncate=config.truncate_seq)
                pooling = embed(keys.distances(queries, 2 ** (block - 1), 2))
            embeddings.append([embed(queries.distances(queries, 2**block, 1)), pooling])
            keys = queries
        return embeddings

    return get_position_embeds


def _sinusoids(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = positions.to(frequencies.dtype)[:, None] * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


_MODELING = "transformers.models.{0}.modeling_{0}"
_FUNNEL = _MODELING.format("funnel")
_PLACES: tuple[tuple[str, str, str, Factory], ...] = (
    (_FUNNEL, "FunnelAttentionStructure", "get_position_embeds", _funnel_positions),
    (_states.CACHES, "LinearAttentionLayer", "update_conv_state", _states.joined_state),
    (_states.CACHES, "LinearAttentionLayer", "update_recurrent_state", _states.replaced_state),
    (_states.CACHES, "Cache", "get_recurrent_state", _scans.remembered),
    *((_MODELING.format(name), "", "mamba_selective_scan", _scans.selective) for name in _scans.SELECTIVE),
    *((_MODELING.format(name), "", "mamba2_chunk_scan", _scans.chunked) for name in _scans.CHUNKED),
    (_longformer.MODULE, "LongformerForSequenceClassification", "forward", _longformer.classifier),
    (_longformer.MODULE, "LongformerForQuestionAnswering", "forward", _longformer.reader),
    (_longformer.MODULE, "LongformerModel", "forward", _longformer.encoder),
    (_longformer.MODULE, "LongformerSelfAttention", "forward", _longformer.attention),
)
"""Module, class (none for a function) and name in transformers, and what makes the replacement of the original."""
