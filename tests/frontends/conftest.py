"""A tiny BERT saved as a Hugging Face folder, with a tokenizer made here; a fresh copy for who damages it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "the a cat dog bird river sings runs sleeps falls near under old small quick and never"


def _config(**changes: Any) -> Any:
    from transformers import BertConfig

    sizes = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 24,
    }  # fmt: skip
    return BertConfig(**{**sizes, **changes})


def _save_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer over ``TEXT``."""
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=20).save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: ``encoder`` and ``classifier`` in one file, ``sharded`` in several; not to be written to."""
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    encoder = BertModel(_config())
    classifier = BertForSequenceClassification(_config(num_labels=3))
    folders = {name: tmp_path_factory.mktemp(name) for name in ("encoder", "classifier", "sharded")}
    encoder.save_pretrained(folders["encoder"])
    classifier.save_pretrained(folders["classifier"])
    encoder.save_pretrained(folders["sharded"], max_shard_size="20KB")
    for folder in folders.values():
        _save_tokenizer(folder)
    return folders


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``copy("encoder", hidden_size=33)``: a copy to damage, its config.json changed."""

    def make(name: str = "encoder", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(saved[name], folder)
        if changes:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return make


@pytest.fixture(scope="session")
def inputs() -> Callable[[int, int], dict[str, torch.Tensor]]:
    """``inputs(rows, length)``: token ids, the last row padded, token types."""

    def make(rows: int, length: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(rows * 100 + length)
        ids = torch.randint(0, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[-1, length // 2 :] = 0
        types = torch.randint(0, 2, ids.shape, generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    return make
