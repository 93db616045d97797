"""What a model will be traced for, before it is read."""

from __future__ import annotations

import os

import torch

from bitlower.frontends._tasks import SPEECH
from bitlower.frontends.locate import GGUF, locate
from bitlower.ir.json_files import read_json
from bitlower.ir.tasks import SPEECH_RECOGNITION, TEXT_GENERATION

_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def is_decoder(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as a causal language model; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    if task is not None:
        return task == TEXT_GENERATION
    if not isinstance(model, torch.nn.Module) and locate(model).suffix == GGUF:
        return True
    return _architecture(model).endswith(_SUFFIXES)


def is_speech_reader(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one that reads sound; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    return task in (None, SPEECH_RECOGNITION) and _architecture(model) == SPEECH


def _architecture(model: str | os.PathLike[str] | torch.nn.Module) -> str:
    """The name of the model's class; empty where the configuration names none."""
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    try:
        names = read_json(locate(model) / "config.json", finite=False)["architectures"]
        return str(names[0]) if names else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # the frontend says what is wrong with it
