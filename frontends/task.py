"""What a model will be traced for, before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bitlower.frontends._tasks import PIXELS, task_of
from bitlower.frontends.locate import GGUF, locate
from bitlower.ir import BitlowerError
from bitlower.ir.json_files import read_json
from bitlower.ir.tasks import TASKS, TEXT_GENERATION

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
    return any(name.endswith(_SUFFIXES) for name in _architectures(place)[:1])


def is_picture_model(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one that reads pictures alone; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    if task is not None:
        return task in TASKS and TASKS[task].pictures
    if isinstance(model, torch.nn.Module):
        return getattr(model, "main_input_name", None) == PIXELS
    place = locate(model)
    try:
        return place.suffix != GGUF and TASKS[task_of(_architectures(place), "")].pictures
    except BitlowerError:
        return False  # the frontend refuses it


def _architectures(folder: Path) -> list[str]:
    """What the configuration in ``folder`` names; nothing where the frontend will say what is wrong with it."""
    try:
        named = read_json(folder / "config.json", finite=False)["architectures"]
        return [str(name) for name in named]
    except (OSError, ValueError, KeyError, TypeError):
        return []
