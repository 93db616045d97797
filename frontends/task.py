"""What a model will be traced for, before it is read."""

from __future__ import annotations

import os

import torch

from bitlower.frontends.locate import GGUF, locate
from bitlower.ir.json_files import read_json
from bitlower.ir.tasks import TEXT_GENERATION

_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def is_decoder(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as a causal language model; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    if task is not None:
        return task == TEXT_GENERATION
    if isinstance(model, torch.nn.Module):
        return type(model).__name__.endswith(_SUFFIXES)
    place = locate(model)
    if place.suffix == GGUF:
        return True
    try:
        names = read_json(place / "config.json", finite=False)["architectures"]
        return bool(names) and str(names[0]).endswith(_SUFFIXES)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the frontend says what is wrong with it
