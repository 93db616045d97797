"""Which tokens of a batch are there, and which only fill its rows up.

A text lies along ``sequence``. Of an encoder-decoder the target does, and its source along ``encoder_sequence``.
"""

from __future__ import annotations

import torch

from bitlower.ir.fit import Batch, ValueSpec

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "past + sequence"
ENCODER_SEQUENCE = "encoder_sequence"
ENCODER_PAST, ENCODER_REST = "encoder_past", "encoder_rest"
"""Positions of the source whose keys and values a decoder is handed (none before its first step, then all), and those
whose keys and values it computes: the others."""
SAMPLES, SOUND = "samples", "input_values"
"""Values of a sound along its time, and the input that has them; its mask is of them, and not of tokens."""
PICTURES = "pictures"
"""How many pictures there are, where they need not be as many as the texts."""
TARGET, TARGET_MASK = "decoder_input_ids", "decoder_attention_mask"
"""Inputs of an encoder-decoder: the target's tokens, and which of them and of those before are no padding."""
SOURCE_MASK = "encoder_attention_mask"
"""What the decoder alone calls the mask of the source."""
TOKENS, MASK = "input_ids", "attention_mask"
"""Inputs of models of one text; of an encoder-decoder, its source."""

PAST_NAME, PRESENT_NAME = "past_key_values.", "present."
"""What the names of a decoder's carried tensors begin with, where they go in and where they come out."""


def is_past(spec: ValueSpec) -> bool:
    """Whether an input is what earlier tokens left, and may be left out before the first one.

    Keys and values are empty then; a state whose size is fixed but for the batch (convolutions, state-space models) is
    zero.
    """
    sizes = spec.type.shape
    fixed = all(size == BATCH or isinstance(size, int) for size in sizes)
    return PAST in sizes or ENCODER_PAST in sizes or (fixed and spec.name.startswith(PAST_NAME))


def token_ids(batch: Batch, dim: str = SEQUENCE) -> torch.Tensor | None:
    """The token ids along ``dim``, ``[batch, dim]``; None where the batch has none.

    Args:
        batch: inputs by name.
        dim: :data:`SEQUENCE` or :data:`ENCODER_SEQUENCE`.
    """
    ids = batch.get(TARGET if dim == SEQUENCE and TARGET in batch else TOKENS)
    return ids if ids is not None and ids.dim() == 2 else None


def token_mask(batch: Batch, dim: str | None = SEQUENCE) -> torch.Tensor | None:
    """Whether each of the tokens along ``dim`` is no padding, ``[batch, dim]``; None where nothing says so.

    A decoder's mask covers the past too; its last columns are those of the current tokens.
    """
    mask = _whole_mask(batch, dim)
    if mask is None or dim != SEQUENCE:
        return mask
    ids = token_ids(batch)
    length = ids.shape[1] if ids is not None else mask.shape[1]
    return mask[:, mask.shape[1] - length :]


def _whole_mask(batch: Batch, dim: str | None) -> torch.Tensor | None:
    """The mask along ``dim``; of :data:`SEQUENCE` and :data:`TOTAL` the one mask with the past."""
    if dim == ENCODER_SEQUENCE:
        mask = batch.get(SOURCE_MASK, batch.get(MASK))
    elif dim in (SEQUENCE, TOTAL) and SOUND not in batch:
        mask = batch.get(TARGET_MASK if TARGET in batch else MASK)
    else:
        return None
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def token_dim(shape: tuple[int | str, ...]) -> str | None:
    """The dimension along which the vectors of a value of this type are tokens; None if none is named so."""
    for size in shape[:-1]:
        for part in str(size).split("*"):
            if part in (SEQUENCE, ENCODER_SEQUENCE):
                return part
    return None


def value_mask(shape: tuple[int | str, ...], batch: Batch) -> torch.Tensor | None:
    """Which elements of a value of this type belong to tokens that are no padding; it broadcasts over the value.

    Tokens lie along every axis called ``sequence``, ``past + sequence`` or ``encoder_sequence``, or along a first axis
    that is a product of the batch and one of them. None where no axis is, or where there is no padding.
    """
    first = str(shape[:1] and shape[0]).split("*")
    if len(first) == 2 and BATCH in first:
        mask = token_mask(batch, token_dim((first[0], first[1], 1)))
        return None if mask is None or bool(mask.all()) else mask.reshape(-1, *[1] * (len(shape) - 1))
    keep: torch.Tensor | None = None
    for axis, size in enumerate(shape):
        along = token_mask(batch, str(size)) if axis and shape[0] == BATCH else None
        if along is not None and not bool(along.all()):
            layout = [along.shape[0], *(along.shape[1] if i == axis else 1 for i in range(1, len(shape)))]
            keep = along.reshape(layout) if keep is None else keep & along.reshape(layout)
    return keep


def positions(mask: torch.Tensor) -> torch.Tensor:
    """``position_ids`` of an attention mask ``[batch, sequence]``: tokens are counted, padding is not."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def token_rows(value: torch.Tensor, shape: tuple[int | str, ...], batch: Batch) -> torch.Tensor:
    """``value``, of this type, as ``[tokens, channels]`` without padding."""
    rows, keep = value.reshape(-1, value.shape[-1]), value_mask(shape, batch)
    return rows if keep is None else rows[keep.expand(*value.shape[:-1], 1).reshape(-1)]
