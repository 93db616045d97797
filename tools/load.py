"""``bitlower.load``: a model as a Program, or an artifact as what runs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from bitlower import frontends
from bitlower.backends.base import Model
from bitlower.backends.registry import answering, writer_of
from bitlower.ir import Program


def load(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    task: str | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    mapped: bool | None = None,
    traces: Path | None = None,
) -> Program | Model:
    """What :func:`bitlower.frontends.load` makes of a model; of an artifact what its backend runs it with.

    Both are called with inputs by name, and have ``inputs`` and ``outputs``. Artifacts of decoders and of
    encoder-decoders also ``generate``.

    Raises:
        BitlowerError: there is no such model, it cannot be traced, or the artifact does not run here.
        CheckError: a file of the artifact is missing or not as it was written.
    """
    if not isinstance(model, torch.nn.Module):
        writer = writer_of(Path(model))
        if writer is not None:
            with answering(writer):
                loaded = writer.load(Path(model))
            if loaded is not None:
                return loaded
    return frontends.load(model, task=task, example_inputs=example_inputs, mapped=mapped, traces=traces)
