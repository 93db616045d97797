"""What lies beside the weights of a Hugging Face folder: it goes along, and its tokens must be the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._tokenizer import check_same_tokens, from_files, load_tokenizer
from bitlower.ir import BitlowerError
from bitlower.ir.assets import GENERATION, is_tokenizer, left_behind, modules_root, read_assets
from bitlower.ir.diagnostics import shorten
from bitlower.ir.json_files import object_of, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = 8
"""So many names are listed in a note."""
TEXT_GENERATION = "text-generation"
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def collect(folder: Path, model: PreTrainedModel, task: str, source: str) -> tuple[dict[str, bytes], list[str]]:
    """The files that go along with the model in ``folder``, and notes about them.

    Raises:
        BitlowerError: the tokenizer gives tokens that the model's embedding has no row for.
        CheckError: the tokenizer reads a file that is not among those that go along.
    """
    assets, notes = read_assets(folder), list[str]()
    if any(map(is_tokenizer, assets)):
        try:
            tokenizer = load_tokenizer(folder, source)
        except BitlowerError as error:
            notes.append(f"{' '.join(error.message.split())[:300]}; its files go along, its tokens were not checked")
        else:
            assets = read_assets(folder, _own_files(tokenizer))
            carried = from_files(tuple(sorted(assets.items())), json.dumps(plain_config(model)), source)
            check_same_tokens(carried, tokenizer, f"the tokenizer of {source} without the files that stay behind")
            notes += check_tokens(tokenizer, model, task, source)
    notes += check_generation(assets, model, source)
    return assets, [*notes, *_files_notes(folder, assets)]


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of ``model`` as plain data, without where it was loaded from."""
    form: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    form.pop("_name_or_path", None)
    return form


def _own_files(tokenizer: Any) -> set[str]:
    """The names of the files that a tokenizer says that it reads."""
    names = getattr(tokenizer, "vocab_files_names", {})
    return {name for name in names.values() if isinstance(name, str)} if isinstance(names, Mapping) else set()


def _files_notes(folder: Path, assets: Mapping[str, bytes]) -> Iterator[str]:
    pickled = [name for name in assets if name.endswith(".bin")]
    if pickled:
        yield f"pickled files go along unread: {_listed(pickled)}"
    root = modules_root(folder) or folder
    beside = left_behind(folder, assets) if root == folder else []
    if beside:
        yield f"beside the model and left behind: {_listed(beside)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def embedding_rows(model: PreTrainedModel) -> int | None:
    """How many tokens the input embedding of ``model`` has a row for; None if it reads no tokens."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    reads_tokens = model.main_input_name == "input_ids" and isinstance(weight, torch.Tensor) and weight.dim() == 2
    return int(weight.shape[0]) if reads_tokens and weight is not None else None


def check_float(config: Mapping[str, Any], owner: str) -> None:
    """See that a configuration is that of a float model, before its weights are read.

    Raises:
        BitlowerError: its ``quantization_config`` names a format.
    """
    form = config.get("quantization_config")
    if form:
        method = form.get("quant_method") if isinstance(form, Mapping) else None
        raise BitlowerError(
            f"{owner} is quantized already ({shorten(str(method or 'in a format without a name'))})",
            hint="give the float model that it was made from",
        )


def check_padding(config: Mapping[str, Any], owner: str) -> None:
    """See that the padding token of a configuration is one of its tokens, before a model is made of it.

    Raises:
        BitlowerError: it is not.
    """
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise BitlowerError(
            f"{owner}: config.json names the padding token {pad}, and has tokens from 0 to {rows - 1} (vocab_size)",
            hint="set pad_token_id to a token of the model, or to null",
        )


def check_tokens(tokenizer: Any, model: PreTrainedModel, task: str, owner: str) -> list[str]:
    """See that the model has a row in its embedding for every token of its tokenizer; notes on those without.

    Special tokens that the tokenizer does not use by itself may lie beyond the table, and are noted. So may the padding
    token of a language model, whose windows are not padded.

    Raises:
        BitlowerError: an ordinary token, the padding token, or one that stands in every text has no row.
    """
    rows = embedding_rows(model)
    if rows is None:
        return []
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    pad = tokenizer.pad_token
    if pad in beyond and task != TEXT_GENERATION:
        raise BitlowerError(
            f"the padding token {pad!r} of {owner} has the number {beyond[pad]}, the embedding has {rows} rows (0 to "
            f"{rows - 1})",
            hint=f"name a token of the model as pad_token in tokenizer_config.json{_such_as(tokenizer, rows)}",
        )
    needed = {tokenizer.unk_token, *tokenizer.convert_ids_to_tokens(tokenizer("a", verbose=False)["input_ids"])}
    special = _special(tokenizer) - needed
    ordinary = {token: number for token, number in beyond.items() if token not in special}
    if ordinary:
        token = max(ordinary, key=lambda name: ordinary[name])
        raise BitlowerError(
            f"the tokenizer of {owner} gives tokens up to {ordinary[token]} ({token!r}), the embedding has {rows} rows "
            f"(0 to {rows - 1})",
            hint="take the model's own tokenizer, or resize the model's embedding to its tokens",
        )
    if not beyond:
        return []
    names = _listed([f"{token!r} ({number})" for token, number in sorted(beyond.items(), key=lambda item: item[1])])
    return [f"special tokens beyond the {rows} rows of the embedding, which no input may hold: {names}"]


def _special(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _such_as(tokenizer: Any, rows: int) -> str:
    number = tokenizer.eos_token_id
    return f", such as {tokenizer.eos_token!r}" if isinstance(number, int) and number < rows else ""


def check_generation(assets: Mapping[str, bytes], model: PreTrainedModel, owner: str) -> list[str]:
    """Notes on tokens that ``generation_config.json`` names and the model has no row for.

    Raises:
        BitlowerError: it is not a JSON object.
    """
    rows = embedding_rows(model)
    if rows is None or GENERATION not in assets:
        return []
    try:
        form = object_of(parse_json(assets[GENERATION], finite=False))
    except ValueError as error:
        raise BitlowerError(f"{owner}: {GENERATION} cannot be read: {error}", hint="fetch the file again") from None
    tokens = []
    for key in _ENDS:
        named = form.get(key)
        for number in named if isinstance(named, list) else [named]:
            if isinstance(number, int) and number >= rows:
                tokens.append(f"{key} {number}")
    return [f"{GENERATION} names tokens beyond the {rows} rows of the embedding: {_listed(tokens)}"] if tokens else []
