"""From texts to input batches, with the tokenizer that belongs to the Program: one row a text, or windows of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from bitlower.ir import BitlowerError, Program
from bitlower.ir.scratch import scratch_folder


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
    tokenizer = _padding_tokenizer(program)
    limit = min(max_length, program.context_length or max_length, tokenizer.model_max_length)
    names = [spec.name for spec in program.inputs]
    result = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        second = [list(pairs[part])] if pairs is not None else []
        encoded = tokenizer(
            list(texts[part]), *second, padding=True, truncation=True, max_length=limit, return_tensors="pt",
            return_attention_mask="attention_mask" in names, return_token_type_ids="token_type_ids" in names,
        )  # fmt: skip
        if "position_ids" in names:
            encoded["position_ids"] = positions(encoded["attention_mask"])
        result.append({name: encoded[name].contiguous() for name in names if name in encoded})
    return result


def positions(mask: torch.Tensor) -> torch.Tensor:
    """``position_ids`` of an attention mask ``[batch, sequence]``: tokens are counted, padding is not."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def token_ids(program: Program, text: str) -> torch.Tensor:
    """The tokens of ``text`` as a whole, ``[n]`` int64, with what the tokenizer puts at its start and end.

    Raises:
        BitlowerError: the program has no tokenizer, or the text has no token.
    """
    encoded = _tokenizer(program)(text, verbose=False)["input_ids"]
    if not encoded:
        raise BitlowerError("there is no text to tokenize")
    return torch.tensor(encoded, dtype=torch.int64)


def decode(program: Program, ids: Sequence[int]) -> str:
    """The text of token ids; special tokens are left out.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    return str(_tokenizer(program).decode(list(ids), skip_special_tokens=True))


def windows(program: Program, ids: torch.Tensor, *, batch_size: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of equal length, ``[count, length]``, as input batches without padding; ``batch_size`` rows in each.

    Raises:
        BitlowerError: the model takes fewer tokens than a row has.
    """
    check_length(program, ids.shape[1])
    names = [spec.name for spec in program.inputs]
    result = []
    for rows in torch.split(ids, batch_size):
        mask = torch.ones_like(rows)
        known = {"input_ids": rows.contiguous(), "attention_mask": mask, "position_ids": positions(mask)}
        known["token_type_ids"] = torch.zeros_like(rows)
        result.append({name: known[name] for name in names if name in known})
    return result


def random_windows(
    program: Program, *, count: int = 2, length: int = 32, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one row of tokens drawn at random: for comparisons that need no text.

    Raises:
        BitlowerError: the program does not read token ids of a known vocabulary.
    """
    entries = program.config.get("vocab_size")
    if not isinstance(entries, int) or "input_ids" not in (spec.name for spec in program.inputs):
        raise BitlowerError(
            f"{program.source or 'the model'} reads no token ids, so that inputs cannot be drawn for its checks",
            hint="give calibration batches",
        )
    length = min(length, program.context_length or length)
    return windows(program, torch.randint(entries, (count, length), generator=torch.Generator().manual_seed(seed)))


def check_length(program: Program, length: int) -> None:
    """See that the model takes ``length`` tokens at once.

    Raises:
        BitlowerError: it does not, or there would be nothing to predict.
    """
    longest = program.context_length or length
    if not 2 <= length <= longest:
        raise BitlowerError(
            f"windows of {length} tokens do not fit the model", hint=f"it takes 2 to {max(longest, 2)} tokens"
        )


def _padding_tokenizer(program: Program) -> Any:
    tokenizer = _tokenizer(program)
    if tokenizer.pad_token is None and program.task == "text-generation":
        tokenizer.pad_token = tokenizer.eos_token  # masked, so that any token will do
    if tokenizer.pad_token is None:
        raise BitlowerError(
            f"the tokenizer of {program.source} has no padding token", hint="name one in tokenizer_config.json"
        )
    return tokenizer


def _tokenizer(program: Program) -> Any:
    from transformers import AutoTokenizer

    if not program.assets:
        raise BitlowerError(
            f"{program.source or 'the model'} has no tokenizer files",
            hint="put tokenizer.json beside config.json, or give batches of tensors",
        )
    with scratch_folder() as folder:
        for name, data in program.assets.items():
            (folder / name).write_bytes(data)
        (folder / "config.json").write_text(json.dumps(program.config))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever its libraries raise on damaged files
            raise BitlowerError(f"the tokenizer of {program.source} cannot be loaded: {error}") from None
    return tokenizer
