"""From texts to input batches, with the tokenizer that belongs to the Program: one row a text, or windows of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bitlower.frontends._tokenizer import PROBES, check_same_tokens, leading_tokens, load_tokenizer, tokenizer_of
from bitlower.frontends.captions import attends_to_padding, reads_captions, text_settings
from bitlower.frontends.locate import locate
from bitlower.frontends.pairs import pair_batches, random_pairs
from bitlower.frontends.pictures import picture_batches, random_pictures, reads_pictures
from bitlower.frontends.sound import reads_sound, sound_batches
from bitlower.frontends.waveforms import random_waveforms, reads_waveforms, waveform_batches
from bitlower.ir import BitlowerError, Program, nearest
from bitlower.ir.assets import is_tokenizer
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.tokens import MASK, positions

BOS = ("auto", "always", "never")
"""Rules for what windows begin with; see :func:`window_lead`."""
BOXES = "bbox"
"""The input of models that read where each token stands on a page."""


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
        texts: one sequence each; of an encoder-decoder, its sources; of a model that reads sound or pictures, paths of
            files.
        pairs: the second sequence of each, for tasks on pairs; of an encoder-decoder, its targets, which it writes
            itself where there are none; of a model that reads pictures and texts, the texts.
        max_length: in tokens; longer sequences are cut, to what the model can take at most.
        batch_size: texts in a batch.

    Raises:
        BitlowerError: the program has no tokenizer that can pad, there is no text, the model does not know a token, or
            the numbers make no sense.
    """
    if not texts:
        raise BitlowerError("there is no text to tokenize")
    if pairs is not None and len(pairs) != len(texts):
        raise BitlowerError(f"there are {len(texts)} texts and {len(pairs)} second sequences", hint="give one for each")
    check_sizes(batch_size, max_length)
    if reads_pictures(program):
        return picture_batches(program, [Path(text) for text in texts], batch_size=batch_size)
    if reads_waveforms(program):
        return waveform_batches(program, [Path(text) for text in texts], batch_size=batch_size)
    if reads_sound(program):
        files = [Path(text) for text in texts]
        return sound_batches(program, files, pairs, max_length=max_length, batch_size=batch_size).batches
    if is_encoder_decoder(program):
        with explaining(program):
            return pair_batches(program, texts, pairs, max_length=max_length, batch_size=batch_size).batches
    if not reads_captions(program):
        return _text_batches(program, texts, pairs, max_length, batch_size)
    if pairs is None:
        raise BitlowerError(f"{program.source or 'the model'} reads texts beside pictures, and there are none")
    pictures = picture_batches(program, [Path(text) for text in texts], batch_size=batch_size)
    captions = _text_batches(program, pairs, None, max_length, batch_size)
    return [{**text, **picture} for text, picture in zip(captions, pictures, strict=True)]


def reads_files(program: Program) -> bool:
    """Whether what :func:`batches` takes as texts of ``program`` are paths of files."""
    return any(reads(program) for reads in (reads_pictures, reads_sound, reads_captions, reads_waveforms))


def _text_batches(
    program: Program, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Texts as a tokenizer has them, with the second sequence of each, if there is one."""
    tokenizer = tokenizer_of(program, pads=True)
    limit, whole = token_limit(program, max_length), attends_to_padding(program)
    padding: dict[str, Any] = {"padding": "max_length" if whole else True, "truncation": True, "max_length": limit}
    names = [spec.name for spec in program.inputs]
    result = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        second = [list(pairs[part])] if pairs is not None else []
        with explaining(program):
            encoded = tokenizer(
                list(texts[part]), *second, **padding, return_tensors="pt",
                return_attention_mask=MASK in names, return_token_type_ids="token_type_ids" in names,
            )  # fmt: skip
        if whole and MASK in encoded:
            encoded[MASK] = torch.ones_like(encoded[MASK])
        result.append(model_inputs(program, dict(encoded)))
    return result


def check_sizes(batch_size: int, max_length: int) -> None:
    """See that there can be batches of so many texts of so many tokens.

    Raises:
        BitlowerError: there cannot.
    """
    if batch_size < 1 or max_length < 4:
        raise BitlowerError(
            f"batches of {batch_size} texts of {max_length} tokens make no sense", hint="take 1 and 4 at least"
        )


def token_limit(program: Program, max_length: int) -> int:
    """Tokens of a text at most: ``max_length``, or what the model or its tokenizer takes if that is less.

    Texts that are all padded to one length have that.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    tokenizer = tokenizer_of(program)
    if attends_to_padding(program) and program.context_length:
        return program.context_length
    with explaining(program):
        return min(max_length, program.context_length or max_length, int(tokenizer.model_max_length))


def model_inputs(program: Program, encoded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``program`` reads of padded tokens and what belongs to them, ``[batch, sequence]`` int64 by name.

    Raises:
        BitlowerError: the model does not know one of the tokens.
    """
    ids = encoded["input_ids"]
    _check_ids(program, ids)
    names, known = [spec.name for spec in program.inputs], dict(encoded)
    if "position_ids" in names:
        known["position_ids"] = positions(encoded["attention_mask"])
    if BOXES in names:
        known[BOXES] = no_boxes(ids)
    return {name: known[name].contiguous() for name in names if name in known}


def _check_ids(program: Program, ids: torch.Tensor) -> None:
    """See that the model knows the tokens ``ids``.

    Raises:
        BitlowerError: one is beyond its vocabulary.
    """
    entries, largest = text_settings(program).get("vocab_size"), int(ids.max()) if ids.numel() else 0
    if isinstance(entries, int) and largest >= entries:
        token = tokenizer_of(program).convert_ids_to_tokens(largest) if program.assets else ""
        raise BitlowerError(
            f"the texts hold the token {token!r} ({largest}), {program.source or 'the model'} has {entries} tokens (0 "
            f"to {entries - 1})",
            hint="take the token out of the texts, or name another padding token in tokenizer_config.json",
        )


def no_boxes(ids: torch.Tensor) -> torch.Tensor:
    """Boxes of tokens ``[batch, sequence]`` that stand nowhere: zeros, as models of text and boxes take for those."""
    return ids.new_zeros((*ids.shape, 4))


def token_ids(program: Program, text: str) -> torch.Tensor:
    """The tokens of ``text`` as a whole, ``[n]`` int64, with what the tokenizer puts at its start and end.

    Raises:
        BitlowerError: the program has no tokenizer, or the text has no token.
    """
    tokenizer = tokenizer_of(program)
    with explaining(program):
        encoded = tokenizer(text, verbose=False)["input_ids"]
    if not encoded:
        raise BitlowerError("there is no text to tokenize")
    return torch.tensor(encoded, dtype=torch.int64)


def text_ids(program: Program, text: str) -> torch.Tensor:
    """The tokens of ``text`` alone, ``[n]`` int64: what its windows are cut from.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    encoded = tokenizer_of(program)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(encoded, dtype=torch.int64)


def window_lead(program: Program, bos: str = "auto") -> tuple[int, ...]:
    """The tokens that every window of a text begins with, and every prompt.

    Args:
        program: a language model.
        bos: ``auto`` takes what the tokenizer puts in front of a text by itself, often nothing; ``always`` its token
            for the beginning if that is nothing; ``never`` nothing.

    Raises:
        BitlowerError: the program has no tokenizer, or that has no such token.
    """
    if bos not in BOS:
        raise BitlowerError(f"unknown rule {bos!r} for the beginning of windows", hint=nearest(bos, BOS))
    if bos == "never":
        return ()
    tokenizer = tokenizer_of(program)
    tokens = leading_tokens(tokenizer)
    if tokens or bos == "auto":
        return tuple(tokens)
    if tokenizer.bos_token_id is None:
        raise BitlowerError(
            f"the tokenizer of {program.source or 'the model'} has no token that begins a text",
            hint="bos is auto or never for it",
        )
    return (int(tokenizer.bos_token_id),)


def lead_names(program: Program, lead: Sequence[int]) -> str:
    """The tokens ``lead`` as text, such as ``<bos>``."""
    return " ".join(map(str, tokenizer_of(program).convert_ids_to_tokens(list(lead)))) if lead else ""


def text_ends(program: Program) -> tuple[int | None, int | None]:
    """The tokens that begin and that end a text, as the tokenizer names them.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    tokenizer = tokenizer_of(program)
    return tokenizer.bos_token_id, tokenizer.eos_token_id


def decode(program: Program, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of token ids; special tokens are left out, unless ``special``.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    tokenizer = tokenizer_of(program)
    with explaining(program):
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def windows(program: Program, ids: torch.Tensor, *, batch_size: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of equal length, ``[count, length]``, as input batches without padding; ``batch_size`` rows in each.

    Raises:
        BitlowerError: the model takes fewer tokens than a row has, or does not know one of them.
    """
    check_length(program, ids.shape[1])
    _check_ids(program, ids)
    result = []
    for rows in torch.split(ids, batch_size):
        known = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "token_type_ids": torch.zeros_like(rows)}
        result.append(model_inputs(program, known))
    return result


def random_windows(
    program: Program, *, count: int = 2, length: int = 32, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one row of tokens, one picture or both, or one sound, drawn at random.

    They are for comparisons that need no data.

    Raises:
        BitlowerError: the program reads something else, or token ids of a vocabulary whose size is not known.
    """
    if reads_pictures(program):
        return random_pictures(program, count=count, seed=seed)
    if reads_waveforms(program):
        return random_waveforms(program, count=count, seed=seed)
    if is_encoder_decoder(program):
        return random_pairs(program, count=count, length=length, seed=seed)
    entries = text_settings(program).get("vocab_size")
    if not isinstance(entries, int) or "input_ids" not in (spec.name for spec in program.inputs):
        raise BitlowerError(
            f"{program.source or 'the model'} reads no token ids, so that inputs cannot be drawn for its checks",
            hint="give calibration batches",
        )
    length = min(length, program.context_length or length)
    rows = windows(program, torch.randint(entries, (count, length), generator=torch.Generator().manual_seed(seed)))
    pictures = random_pictures(program, count=count, seed=seed) if reads_captions(program) else [{}] * count
    return [{**text, **picture} for text, picture in zip(rows, pictures, strict=True)]


def check_tokenizer(program: Program, folder: Path) -> None:
    """See that the tokenizer that a backend wrote into ``folder``, if it did, returns the tokens of the program's own.

    Raises:
        CheckError: it does not, for one of a few texts of many scripts, or it has another chat template.
    """
    if not any((folder / name).is_file() for name in program.assets if is_tokenizer(name)):
        return
    try:
        own = tokenizer_of(program)
    except BitlowerError:
        return  # the frontend noted that it cannot be loaded here
    check_same_tokens(load_tokenizer(folder, str(folder)), own, "the tokenizer of the artifact")


def check_same_texts(first: str, second: str) -> None:
    """See that two models split texts into the same tokens, before either runs; figures of others do not compare.

    Models whose folders hold no tokenizer, such as GGUF files, are not looked at.

    Args:
        first: a model's or an artifact's folder, or its name.
        second: that of the other.

    Raises:
        BitlowerError: they do not, or there is no such model.
    """
    folders = [locate(name, weights=False) for name in (first, second)]
    if not all(folder.is_dir() and any(is_tokenizer(path.name) for path in folder.iterdir()) for folder in folders):
        return
    a, b = (load_tokenizer(folder, str(folder)) for folder in folders)
    if any(a(t, add_special_tokens=False)["input_ids"] != b(t, add_special_tokens=False)["input_ids"] for t in PROBES):
        raise BitlowerError(
            f"{first} and {second} split texts into other tokens, so that no figure of one compares with the other's",
            hint="compare models that have the same tokenizer",
        )


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


@contextmanager
def explaining(program: Program) -> Iterator[None]:
    """Whatever a tokenizer raises that was loaded from settings of odd types, as an error that names it."""
    try:
        yield
    except BitlowerError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BitlowerError(
            f"the tokenizer of {program.source} fails: {why}", hint="check its tokenizer_config.json"
        ) from None
