"""The one door to all frontends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bitlower.frontends.gguf import load_gguf
from bitlower.frontends.hub import is_hub_name, pinned
from bitlower.frontends.huggingface import PreTrained, is_huggingface, read_folder, trace_few_layers, trace_model
from bitlower.frontends.locate import GGUF, locate
from bitlower.frontends.module import trace_module
from bitlower.ir import BitlowerError, Program


def load(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    task: str | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    mapped: bool | None = None,
    traces: Path | None = None,
    few_layers: bool = False,
) -> Program:
    """Trace ``model`` into a Program at level ``float``.

    Args:
        model: a folder as Hugging Face writes it (``config.json``, safetensors, tokenizer files), a GGUF file,
            ``package:NAME`` for either inside an installed package, ``hf:ORG/NAME[@REVISION]`` for a model of the
            Hugging Face hub, or a module in memory.
        task: one of :data:`bitlower.ir.tasks.TASKS`, by the names of transformers' pipelines; as the model's
            architecture says if left out.
        example_inputs: needed for a module that is not Hugging Face's: its inputs by name, at least 2 in each dimension
            that may vary.
        mapped: leave the weights of a folder or file in files and read them when they are used, so that the model need
            not fit into memory; None: if they take more than 768 MiB in float32.
        traces: a folder in which what was traced is kept without its weights: another model of that architecture, or
            this one again, is not traced. None: the folder that the environment's ``BITLOWER_TRACES`` names, or none.
        few_layers: take the first layers alone, of each kind that there is, of a folder or file whose layers repeat.

    Raises:
        BitlowerError: the model is not there, is damaged, wants to run remote code, or cannot be traced (the message
            names the line of the model).
    """
    if not isinstance(model, torch.nn.Module):
        place, source = locate(model), os.fspath(model)
        source = pinned(source) if is_hub_name(source) else source
        if place.suffix == GGUF:
            pretrained = replace(load_gguf(place, task, mapped=mapped), source=source)
        else:
            pretrained = read_folder(place, task=task, source=source, mapped=mapped)
        return trace_few_layers(pretrained, traces) if few_layers else trace_model(pretrained, traces=traces)
    if is_huggingface(model):
        return trace_model(PreTrained(model, task=task), example_inputs=example_inputs, traces=traces)
    if example_inputs is None:
        raise BitlowerError(f"{type(model).__name__} needs example inputs to be traced", hint="pass `example_inputs`")
    return trace_module(model, example_inputs, task=task or "custom")
