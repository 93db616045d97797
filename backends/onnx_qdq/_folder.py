"""The artifact's folder, laid out as Hugging Face does: the model, config.json and the tokenizer's files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from bitlower.backends import _folder
from bitlower.backends._folder import flush
from bitlower.ir import Program

MODEL, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"


def write_model(model: ir.Model, folder: Path, *, threshold: int) -> list[str]:
    """Write the model, its tensors beside it if they are more than ``threshold`` bytes; the names of the files.

    Each file appears whole: it is written in a folder of its own, flushed, and moved into place.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as scratch:
        path = Path(scratch) / MODEL
        ir.save(model, path, external_data=DATA if size > threshold else None)
        names = [name for name in (DATA, MODEL) if (Path(scratch) / name).is_file()]
        for name in names:
            flush(Path(scratch) / name)
            (Path(scratch) / name).replace(folder / name)
    return names


def write_assets(program: Program, folder: Path) -> list[str]:
    """Write the tokenizer's files; their names.

    Raises:
        BitlowerError: a file would lie outside the folder, or over one of ours.
    """
    return _folder.write_assets(program, folder, (MODEL, DATA, GENAI))
