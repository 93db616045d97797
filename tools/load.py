"""``bitlower.load``: a model as a Program, or a library of kernels as what runs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from bitlower import frontends
from bitlower.backends._manifest import check_if_artefact
from bitlower.backends.tvm_kernels import Library, is_library, load_library
from bitlower.ir import Program


def load(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    task: str | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    mapped: bool | None = None,
    traces: Path | None = None,
) -> Program | Library:
    """What :func:`bitlower.frontends.load` makes of a model; or the library in a folder of the backend ``tvm-kernels``.

    Both are called with inputs by name, and have ``inputs`` and ``outputs``.

    Raises:
        BitlowerError: there is no such model, it cannot be traced, or the library does not run here.
        CheckError: a file of the library, or of another artefact, is missing or not as it was written.
    """
    if not isinstance(model, torch.nn.Module):
        if is_library(Path(model)):
            return load_library(Path(model))
        check_if_artefact(Path(model))
    return frontends.load(model, task=task, example_inputs=example_inputs, mapped=mapped, traces=traces)
