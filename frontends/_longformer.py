"""Longformer (Beltagy et al., 2020) without steps that depend on values: windows by blocks, global tokens by masks.

transformers gathers the tokens of global attention by their positions, as many as there are. Here a place is kept for
each token that may be global, and a mask says which are. Where that is the first token alone, as for classification,
memory stays linear in the length; where it may be any token, attention is over all pairs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

MODULE = "transformers.models.longformer.modeling_longformer"
_ANY_GLOBAL = (
    "any token may have global attention, which is computed over all pairs of tokens: memory grows with the square of"
    " the length"
)
_QUESTION = (
    "what is before the first separator is the question; that each text has three separators, which transformers"
    " checks, is not checked here"
)


def classifier(original: Any, notes: list[str]) -> Any:
    """A head that gives the first token global attention: a mask of one column."""

    def forward(self: Any, input_ids: Any = None, **arguments: Any) -> Any:
        if arguments.get("global_attention_mask") is None:
            arguments["global_attention_mask"] = torch.ones_like(input_ids[:, :1])
        return original(self, input_ids, **arguments)

    return forward


def reader(original: Any, notes: list[str]) -> Any:
    """A head for question answering, which gives the tokens before the first separator global attention."""

    def forward(self: Any, input_ids: Any = None, **arguments: Any) -> Any:
        if arguments.get("global_attention_mask") is None:
            notes.append(_QUESTION)
            separators = (input_ids == self.config.sep_token_id).long()
            arguments["global_attention_mask"] = (separators.cumsum(1) == 0).long()
        return original(self, input_ids, **arguments)

    return forward


def encoder(original: Any, notes: list[str]) -> Any:
    """The model below its heads; a global attention mask has a column for each token, or for the first ones alone."""

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **flags: Any,
    ) -> Any:
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        tokens = _Tokens.of(hidden, attention_mask, global_attention_mask)
        if tokens.dense:
            notes.append(_ANY_GLOBAL)
        for layer in self.encoder.layer:
            hidden = layer(hidden, attention_mask=tokens)[0]
        pooled = None if self.pooler is None else self.pooler(hidden)
        outputs = sys.modules[MODULE].LongformerBaseModelOutputWithPooling
        return outputs(last_hidden_state=hidden, pooler_output=pooled)

    return forward


def attention(original: Any, notes: list[str]) -> Any:
    """Self-attention of one layer, as section 3.1 has it; rows of padding are 0.

    Near keys and global ones are in one softmax; rows of global tokens see all keys, by weights of their own.
    """

    def forward(self: Any, hidden_states: torch.Tensor, attention_mask: _Tokens, **flags: Any) -> tuple[torch.Tensor]:
        tokens, heads = attention_mask, (self.num_heads, self.head_dim)
        parts = [layer(hidden_states) for layer in (self.query, self.key, self.value)]
        near = _near(parts, tokens, self.one_sided_attn_window_size, heads)
        if tokens.chosen is None:
            return (near,)
        few = hidden_states[:, : tokens.first]
        parts = [self.query_global(few), self.key_global(hidden_states), self.value_global(hidden_states)]
        wide = _attend(parts, tokens.read[:, None, None, :], heads)
        if tokens.dense:
            return (torch.where(tokens.chosen[:, :, None], wide, near),)
        begin = torch.where(tokens.chosen[:, :, None], wide, near[:, : tokens.first])
        return (torch.cat([begin, near[:, tokens.first :]], 1),)

    return forward


@dataclass(frozen=True)
class _Tokens:
    """What the tokens are, for all layers.

    Args:
        read: bool ``[batch, sequence]``, no padding.
        chosen: bool, those with global attention: ``[batch, sequence]``, or ``[batch, first]`` where only the first
            ones may have it; None where none has.
        masks: which keys a query sees, by the window; layers of one window share it.
    """

    read: torch.Tensor
    chosen: torch.Tensor | None
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, hidden: torch.Tensor, mask: torch.Tensor | None, chosen: torch.Tensor | None) -> _Tokens:
        read = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        assert read.shape == hidden.shape[:2], "torch learns here that both have one batch and one sequence"
        return cls(read, None if chosen is None else (chosen != 0) & read[:, : chosen.shape[1]])

    @property
    def first(self) -> Any:
        """How many tokens, from the first on, may have global attention."""
        return 0 if self.chosen is None else self.chosen.shape[1]

    @property
    def dense(self) -> bool:
        """Whether any token may."""
        return bool(self.first == self.read.shape[1])

    def mask(self, window: int) -> torch.Tensor:
        """For the attention of :func:`_near`, bool."""
        if window not in self.masks:
            self.masks[window] = self._pairs(window) if self.dense else self._blocks(window)
        return self.masks[window]

    def _pairs(self, window: int) -> torch.Tensor:
        """Keys that are near or global, ``[batch, 1, sequence, sequence]``."""
        assert self.chosen is not None
        places = torch.arange(self.read.shape[1])
        seen = ((places[:, None] - places).abs() <= window) | self.chosen[:, None, :]
        return (seen & self.read[:, None, :] & self.read[:, :, None])[:, None]

    def _blocks(self, window: int) -> torch.Tensor:
        """Global keys and near ones that are not global, ``[batch · blocks, 1, window, first + 3 · window]``."""
        places, others = torch.arange(window)[:, None], torch.arange(3 * window)
        near = (others >= places) & (others <= places + 2 * window)
        local, begin = self.read, None
        if self.chosen is not None:
            local = torch.cat([self.read[:, : self.first] & ~self.chosen, self.read[:, self.first :]], 1)
            begin = self.chosen[:, :, None]
        keys = _keys(local[:, :, None], window, begin).transpose(1, 2)
        queries = _queries(self.read[:, :, None], window)
        return (keys & queries & functional.pad(near, (self.first, 0), value=True))[:, None]


def _near(parts: list[torch.Tensor], tokens: _Tokens, window: int, heads: tuple[int, int]) -> torch.Tensor:
    """Attention of all queries to the keys near them and to the global ones, ``[batch, sequence, heads · width]``."""
    query, key, value = parts
    if tokens.dense:
        return _attend(parts, tokens.mask(window), heads)
    keys, values = (_keys(part, window, part[:, : tokens.first] if tokens.first else None) for part in (key, value))
    context = _attend([_queries(query, window), keys, values], tokens.mask(window), heads)
    rows, length, width = query.shape
    return context.view(rows, _count(length, window) * window, width)[:, :length]


def _attend(parts: list[torch.Tensor], mask: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Queries, keys and values ``[rows, tokens, heads · width]``; the same of the result."""
    query, key, value = (torch.unflatten(part, -1, heads).transpose(1, 2) for part in parts)
    joined: torch.Tensor = functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    return joined


def _count(length: int, window: int) -> int:
    """Blocks for ``length`` tokens, and one more: never one alone, which torch would take for a fixed size."""
    return (length + window - 1) // window + 1


def _queries(part: torch.Tensor, window: int) -> torch.Tensor:
    """``[batch, sequence, width]`` in blocks, ``[batch · blocks, window, width]``; the last is filled up with 0."""
    rows, length, width = part.shape
    count = _count(length, window)
    return functional.pad(part, (0, 0, 0, count * window - length)).view(rows, count, window, width).flatten(0, 1)


def _keys(part: torch.Tensor, window: int, begin: torch.Tensor | None) -> torch.Tensor:
    """What each block of queries sees: ``begin``, and the block before it, itself and the one behind it.

    Args:
        part: ``[batch, sequence, width]``.
        window: the size of a block.
        begin: ``[batch, first, width]``, for all blocks.
    """
    rows, length, width = part.shape
    count = _count(length, window)
    padded = functional.pad(part, (0, 0, window, (count + 1) * window - length)).view(rows, count + 2, window, width)
    seen = [padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]
    if begin is not None:
        seen.insert(0, begin[:, None].expand(-1, count, -1, -1))
    return torch.cat(seen, 2).flatten(0, 1)
