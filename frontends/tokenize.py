"""From texts to input batches, with the tokenizer that belongs to the Program."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitlower.ir import BitlowerError, Program


def batches(
    program: Program,
    texts: Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    max_length: int = 128,
    batch_size: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Input batches in the order of ``texts``; int64, padded to the longest of the batch.

    Args:
        program: with tokenizer files among its assets.
        texts: one sequence each.
        pairs: the second sequence of each, for tasks on pairs.
        max_length: in tokens; longer sequences are cut, to what the model can take at most.
        batch_size: texts in a batch.

    Raises:
        BitlowerError: the program has no tokenizer that can pad, there is no text, or the numbers make no sense.
    """
    if not texts:
        raise BitlowerError("there is no text to tokenize")
    if pairs is not None and len(pairs) != len(texts):
        raise BitlowerError(f"there are {len(texts)} texts and {len(pairs)} second sequences", hint="give one for each")
    if batch_size < 1 or max_length < 4:
        raise BitlowerError(
            f"batches of {batch_size} texts of {max_length} tokens make no sense", hint="take 1 and 4 at least"
        )
    tokenizer = _tokenizer(program)
    longest = program.config.get("max_position_embeddings") or max_length
    limit = min(max_length, longest, tokenizer.model_max_length)
    names = [spec.name for spec in program.inputs]
    result = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        second = [list(pairs[part])] if pairs is not None else []
        encoded = tokenizer(
            list(texts[part]), *second, padding=True, truncation=True, max_length=limit, return_tensors="pt",
            return_attention_mask="attention_mask" in names, return_token_type_ids="token_type_ids" in names,
        )  # fmt: skip
        result.append({name: encoded[name].contiguous() for name in names if name in encoded})
    return result


def _tokenizer(program: Program) -> Any:
    from transformers import AutoTokenizer

    if not program.assets:
        raise BitlowerError(
            f"{program.source or 'the model'} has no tokenizer files",
            hint="put tokenizer.json beside config.json, or give batches of tensors",
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, data in program.assets.items():
            (Path(folder) / name).write_bytes(data)
        (Path(folder) / "config.json").write_text(json.dumps(program.config))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever its libraries raise on damaged files
            raise BitlowerError(f"the tokenizer of {program.source} cannot be loaded: {error}") from None
    if tokenizer.pad_token is None:
        raise BitlowerError(
            f"the tokenizer of {program.source} has no padding token", hint="name one in tokenizer_config.json"
        )
    return tokenizer
