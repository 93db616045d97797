"""Inputs for encoders: which ones a model takes, and samples of them that look like a tokenizer's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitlower.ir.tokens import BATCH, SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = (BATCH, SEQUENCE)
_LENGTHS = (10, 64, 512)
"""Tokens to trace with: the first of these that the model takes."""
_REPLAYS = ((1, 7), (3, 13))
"""Rows and tokens of the batches that a trace is held against: odd sizes that it was not made with."""


@dataclass(frozen=True)
class EncoderInputs:
    """What an encoder reads, and samples of it.

    Args:
        shapes: of the inputs, by name, in order.
        draw: makes inputs of so many rows and of that length.
        lengths: to trace with; the first that the model takes.
        replays: rows and lengths of what a trace is compared on.
        notes: for whoever loads the model.
    """

    shapes: Mapping[str, tuple[int | str, ...]]
    draw: Callable[[int, int], dict[str, torch.Tensor]]
    lengths: tuple[int, ...] = _LENGTHS
    replays: tuple[tuple[int, int], ...] = _REPLAYS
    notes: tuple[str, ...] = ()


def text_inputs(model: PreTrainedModel) -> EncoderInputs:
    """Texts, as :func:`layout` and :func:`sample` have them."""
    shapes = layout(model)
    return EncoderInputs(shapes, lambda rows, length: sample(model, shapes, rows, length))


def layout(model: PreTrainedModel) -> dict[str, tuple[int | str, ...]]:
    """The inputs of an encoder, in order, and the names of their dimensions.

    Token types come in where the configuration has any, boxes (left, top, right, bottom) where the model reads them.
    """
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    shapes: dict[str, tuple[int | str, ...]] = {"input_ids": _TEXT}
    if "attention_mask" in parameters or open_ended:
        shapes["attention_mask"] = _TEXT
    if (getattr(text_config(model), "type_vocab_size", 0) or 0) > 0 and ("token_type_ids" in parameters or open_ended):
        shapes["token_type_ids"] = _TEXT
    if "bbox" in parameters:
        shapes["bbox"] = (*_TEXT, 4)
    return shapes


def sample(model: PreTrainedModel, names: Mapping[str, Any], rows: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs from a fixed generator: ordinary tokens, one that ends each text, the last row padded if there is room.

    Where the configuration names a separator, each row is a pair of texts: two separators between them, one at the end.

    Args:
        model: an encoder.
        names: of the inputs.
        rows: texts.
        length: tokens in each.
    """
    generator = torch.Generator().manual_seed(0)
    ordinary = _ordinary_tokens(model)
    ids = ordinary[torch.randint(0, len(ordinary), (rows, length), generator=generator)]
    mask = torch.ones((rows, length), dtype=torch.int64)
    mask[-1, length - 2 :] = 0 if length > 3 else 1
    separator, ends = _token(model, "sep_token_id"), _token(model, "eos_token_id")
    last, each = mask.sum(1) - 1, torch.arange(rows)
    if separator is not None and length > 5:
        for place in (last // 3, last // 3 + 1, last):
            ids[each, place] = separator
    elif ends is not None:
        ids[each, last] = ends
    ids = torch.where(mask.bool(), ids, _token(model, "pad_token_id") or 0)
    corners = torch.randint(0, 500, (rows, length, 2), generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "bbox": torch.cat([corners, corners + torch.randint(0, 500, corners.shape, generator=generator)], -1),
    }
    return {name: inputs[name] for name in names}


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model's table takes."""
    config = text_config(model)
    table = model.get_input_embeddings() if config is model.config else None
    entries = getattr(table, "num_embeddings", None) or config.vocab_size
    return int(entries)


def text_config(model: PreTrainedModel) -> Any:
    """What the configuration says about the texts: all of it, or a part where there is another for pictures."""
    return getattr(model.config, "text_config", None) or model.config


def _ordinary_tokens(model: PreTrainedModel) -> torch.Tensor:
    """The token ids that the configuration gives no meaning of their own; all where none is left."""
    keep = torch.ones(vocabulary(model), dtype=torch.bool)
    for key, value in text_config(model).to_dict().items():
        for token in value if isinstance(value, list) else [value]:
            if key.endswith("_token_id") and isinstance(token, int) and 0 <= token < len(keep):
                keep[token] = False
    return keep.nonzero()[:, 0] if keep.any() else torch.arange(len(keep))


def _token(model: PreTrainedModel, name: str) -> int | None:
    """A token that the configuration names, if the model's table has it."""
    value = getattr(text_config(model), name, None)
    return value if isinstance(value, int) and 0 <= value < vocabulary(model) else None
