"""From texts to input batches, with the tokenizer that belongs to the Program."""

from __future__ import annotations

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
        max_length: in tokens; longer sequences are cut.
        batch_size: texts in a batch.

    Raises:
        BitlowerError: the program has no tokenizer, or there is no text.
    """
    if not texts:
        raise BitlowerError("there is no text to tokenize")
    tokenizer = _tokenizer(program)
    names = [spec.name for spec in program.inputs]
    result = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        second = [list(pairs[part])] if pairs is not None else []
        encoded = tokenizer(
            list(texts[part]), *second, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
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
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise BitlowerError(f"the tokenizer of {program.source} cannot be loaded: {error}") from None
