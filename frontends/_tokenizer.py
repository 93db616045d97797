"""The tokenizer that belongs to a model: loaded from files, compared, asked what it puts in front of a text."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitlower.frontends._assets import loading, unpacked
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.assets import is_tokenizer
from bitlower.ir.quiet import quiet

PROBES = (
    "The quick brown fox, 3.14 times (or 1,024?) over it's lazy dogs.",
    "Ünïcode naïve Ελληνικά русский 日本語 한국어 😀 \t two  spaces\nand lines\r\n",
    "",
)
"""Texts on which two tokenizers must agree."""


def load_tokenizer(folder: Path, owner: str) -> Any:
    """Transformers' tokenizer from the files in ``folder``; ``owner`` is for messages.

    Raises:
        BitlowerError: it cannot be loaded.
    """
    with loading("tokenizer", owner):
        return _load(folder)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenizer_of(program: Program, *, pads: bool = False) -> Any:
    """The tokenizer of ``program``; one that ``pads`` takes the end token where a decoder's has no padding token.

    Raises:
        BitlowerError: it has none, it cannot be loaded, or it ``pads`` and has no padding token.
    """
    owner = program.source or "the model"
    if not any(map(is_tokenizer, program.assets)):
        raise BitlowerError(
            f"{owner} has no tokenizer files",
            hint="put tokenizer.json beside config.json, or give batches of tensors",
        )
    ends = pads and program.task == "text-generation"
    tokenizer = from_files(tuple(sorted(program.assets.items())), json.dumps(program.config), owner, ends)
    if pads and tokenizer.pad_token is None:
        raise BitlowerError(
            f"the tokenizer of {program.source} has no padding token", hint="name one in tokenizer_config.json"
        )
    return tokenizer


def from_files(files: tuple[tuple[str, bytes], ...], config: str, owner: str, pads_with_end: bool = False) -> Any:
    """The tokenizer in ``files``, beside the model's configuration; the last two are kept, whosever they are.

    Raises:
        BitlowerError: it cannot be loaded.
    """
    with loading("tokenizer", owner):
        return _from_files(files, config, pads_with_end)


@lru_cache(maxsize=2)
def _from_files(files: tuple[tuple[str, bytes], ...], config: str, pads_with_end: bool) -> Any:
    with unpacked(files, config) as folder:
        tokenizer = _load(folder)
    if pads_with_end and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so that any token will do
    return tokenizer


def check_same_tokens(candidate: Any, expected: Any, what: str) -> None:
    """See that two tokenizers give the same tokens, and the same chat template.

    Raises:
        CheckError: they do not, for one of :data:`PROBES`.
    """
    for text in PROBES:
        ids, wanted = (tokenizer(text, verbose=False)["input_ids"] for tokenizer in (candidate, expected))
        if ids != wanted:
            raise CheckError(f"{what} gives other tokens for {text!r}: {ids[:8]}…, not {wanted[:8]}…")
    if candidate.chat_template != expected.chat_template:
        raise CheckError(f"{what} has another chat template than the model's")


def leading_tokens(tokenizer: Any) -> list[int]:
    """The tokens that ``tokenizer`` puts in front of a text by itself, such as ``<bos>``; often none."""
    whole = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return list(whole[: next(starts, 0)])
