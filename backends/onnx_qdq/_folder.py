"""The artifact's folder, laid out as Hugging Face does: the model, config.json and the tokenizer's files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from bitlower.backends import _folder
from bitlower.backends._folder import flush
from bitlower.ir import Program
from bitlower.ir.stages import DECODER, ENCODER

MODEL, GENAI = "model.onnx", "genai_config.json"
DATA = ".data"
"""What the name of a file of tensors has behind that of its model."""


def model_file(stage: str = "") -> str:
    """The file of a model, or of a stage of one."""
    return f"{stage}_{MODEL}" if stage else MODEL


def stages_in(folder: Path) -> tuple[str, ...]:
    """The stages whose files lie in ``folder``; one without a name where it is a model in one piece."""
    return (ENCODER, DECODER) if (folder / model_file(ENCODER)).is_file() else ("",)


def write_model(model: ir.Model, folder: Path, *, threshold: int, name: str = MODEL) -> list[str]:
    """Write the model as ``name``, its tensors beside it if they are more than ``threshold`` bytes; the files' names.

    Each file appears whole: it is written in a folder of its own, flushed, and moved into place.
    """
    data = f"{name}{DATA}"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as scratch:
        ir.save(model, Path(scratch) / name, external_data=data if size > threshold else None)
        names = [file for file in (data, name) if (Path(scratch) / file).is_file()]
        for file in names:
            flush(Path(scratch) / file)
            (Path(scratch) / file).replace(folder / file)
    return names


def write_assets(program: Program, folder: Path) -> list[str]:
    """Write the tokenizer's files; their names.

    Raises:
        BitlowerError: a file would lie outside the folder, or over one of ours.
    """
    models = [model_file(stage) for stage in ("", ENCODER, DECODER)]
    return _folder.write_assets(program, folder, (*models, *(f"{name}{DATA}" for name in models), GENAI))
