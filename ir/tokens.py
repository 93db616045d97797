"""Which tokens of a batch are there, and which only fill its rows up."""

from __future__ import annotations

import torch

from bitlower.ir.fit import Batch

BATCH, SEQUENCE, TOTAL = "batch", "sequence", "past + sequence"


def token_mask(batch: Batch) -> torch.Tensor | None:
    """Whether each of the tokens in ``input_ids`` is no padding, ``[batch, sequence]``; None where nothing says so.

    A decoder's ``attention_mask`` covers the past too; its last columns are those of the current tokens.
    """
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is None or mask.dim() != 2:
        return None
    length = ids.shape[1] if ids is not None and ids.dim() == 2 else mask.shape[1]
    return mask[:, mask.shape[1] - length :].bool()


def value_mask(shape: tuple[int | str, ...], batch: Batch) -> torch.Tensor | None:
    """Which elements of a value of this type belong to tokens that are no padding; it broadcasts over the value.

    Tokens lie along every axis called ``sequence`` (or ``past + sequence``), or along a first axis that is
    ``batch*sequence``. None where no axis is, or where there is no padding.
    """
    mask = token_mask(batch)
    if mask is None or bool(batch["attention_mask"].all()):
        return None
    if set(str(shape[:1] and shape[0]).split("*")) == {BATCH, SEQUENCE}:
        return mask.reshape(-1, *[1] * (len(shape) - 1))
    keep: torch.Tensor | None = None
    masks = {SEQUENCE: mask, TOTAL: batch["attention_mask"].bool()}
    for axis, size in enumerate(shape):
        if axis and shape[0] == BATCH and size in masks:
            along = masks[size]
            layout = [along.shape[0], *(along.shape[1] if i == axis else 1 for i in range(1, len(shape)))]
            keep = along.reshape(layout) if keep is None else keep & along.reshape(layout)
    return keep


def token_rows(value: torch.Tensor, shape: tuple[int | str, ...], batch: Batch) -> torch.Tensor:
    """``value``, of this type, as ``[tokens, channels]`` without padding."""
    rows, keep = value.reshape(-1, value.shape[-1]), value_mask(shape, batch)
    return rows if keep is None else rows[keep.expand(*value.shape[:-1], 1).reshape(-1)]
