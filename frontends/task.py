"""What a model will be traced for, before it is read."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from bitlower.frontends._tasks import PIXELS, SPEECH, task_of
from bitlower.frontends.locate import GGUF, locate
from bitlower.ir import BitlowerError
from bitlower.ir.json_files import read_json
from bitlower.ir.tasks import SPEECH_RECOGNITION, TASKS, TEXT_GENERATION, Task

_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def is_decoder(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as a causal language model; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    if task is not None:
        return task == TEXT_GENERATION
    if not isinstance(model, torch.nn.Module) and locate(model, weights=False).suffix == GGUF:
        return True
    return any(name.endswith(_SUFFIXES) for name in _architectures(model)[:1])


def is_speech_reader(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one that reads sound; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    return task in (None, SPEECH_RECOGNITION) and _architectures(model)[:1] == [SPEECH]


def is_caption_model(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one of texts and pictures; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    return _says(model, task, lambda known: known.captions)


def is_sound_model(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one of sound alone, in one run; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    return _says(model, task, lambda known: known.sounds)


def is_picture_model(model: str | os.PathLike[str] | torch.nn.Module, task: str | None = None) -> bool:
    """Whether ``model`` will be traced as one that reads pictures alone; of a folder only the configuration is read.

    Raises:
        BitlowerError: there is no such model.
    """
    if task is None and isinstance(model, torch.nn.Module):
        return getattr(model, "main_input_name", None) == PIXELS
    return _says(model, task, lambda known: known.pictures)


def _says(model: str | os.PathLike[str] | torch.nn.Module, task: str | None, about: Callable[[Task], bool]) -> bool:
    """What holds for the task that is named, or that the model's architecture is for."""
    if task is not None:
        return task in TASKS and about(TASKS[task])
    if not isinstance(model, torch.nn.Module) and locate(model, weights=False).suffix == GGUF:
        return False
    try:
        return about(TASKS[task_of(_architectures(model), "")])
    except BitlowerError:
        return False  # the frontend refuses it


def _architectures(model: str | os.PathLike[str] | torch.nn.Module) -> list[str]:
    """The model's class, or what its configuration names; nothing where the frontend will say what is wrong with it."""
    if isinstance(model, torch.nn.Module):
        return [type(model).__name__]
    try:
        named = read_json(locate(model, weights=False) / "config.json", finite=False)["architectures"]
        return [str(name) for name in named]
    except (OSError, ValueError, KeyError, TypeError):
        return []
