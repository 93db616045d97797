"""The artifact's folder, laid out as Hugging Face does: the model, config.json and the tokenizer's files.

An encoder-decoder is two files in one of two layouts (:data:`~bitlower.backends.onnx_qdq.write.optimum.Layout`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from bitlower.backends.artifact import folder as artifact_folder
from bitlower.backends.artifact.folder import flush
from bitlower.backends.onnx_qdq.write.optimum import MERGED, OPTIMUM, OPTIMUM_DATA, Layout
from bitlower.ir import Program
from bitlower.ir.stages import DECODER, ENCODER

MODEL, GENAI = "model.onnx", "genai_config.json"
DATA = ".data"
"""What the name of a file of tensors has behind that of its model."""
SHARED = "shared.onnx.data"
"""The tensors that the stages of an encoder-decoder both read."""
_LARGE = 1 << 10
"""Bytes of a tensor from which it is shared."""


def model_file(stage: str = "", layout: Layout = "genai") -> str:
    """The file of a model, or of a stage of one."""
    if stage == DECODER and layout == OPTIMUM:
        return MERGED
    return f"{stage}_{MODEL}" if stage else MODEL


def files_in(folder: Path) -> dict[str, str]:
    """The files in ``folder`` by the stages that they are; one without a name where it is a model in one piece."""
    if not (folder / model_file(ENCODER)).is_file():
        return {"": MODEL}
    layout: Layout = OPTIMUM if (folder / MERGED).is_file() else "genai"
    return {stage: model_file(stage, layout) for stage in (ENCODER, DECODER)}


def share_tensors(models: Sequence[ir.Model], folder: Path) -> list[str]:
    """Write what all ``models`` hold alike, such as the table of an encoder-decoder, to one file beside them.

    The models read it from there. The name of the file; none where nothing is shared.
    """
    first, *others = (model.graph.initializers for model in models)
    names = [name for name in first if others and all(_alike(first[name], other.get(name)) for other in others)]
    if not names:
        return []
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as scratch:
        tensors = [tensor for name in names if (tensor := first[name].const_value) is not None]
        written = ir.external_data.convert_tensors_to_external(tensors, scratch, SHARED)
        flush(Path(scratch) / SHARED)
        (Path(scratch) / SHARED).replace(folder / SHARED)
    for name, tensor in zip(names, written, strict=True):
        there = ir.ExternalTensor(
            SHARED, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
        )
        for initializers in (first, *others):
            initializers[name].const_value = there
    return [SHARED]


def _alike(value: ir.Value, other: ir.Value | None) -> bool:
    """Whether both hold one tensor, and that is large enough to be worth a place of its own."""
    a, b = value.const_value, other.const_value if other is not None else None
    if a is None or b is None or a.nbytes < _LARGE or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.tobytes() == b.tobytes()


def write_model(model: ir.Model, folder: Path, *, threshold: int, name: str = MODEL, suffix: str = DATA) -> list[str]:
    """Write the model as ``name``, its tensors beside it if they are more than ``threshold`` bytes; the files' names.

    Each file appears whole: it is written in a folder of its own, flushed, and moved into place.

    Args:
        model: its graph is what is written.
        folder: the artifact's.
        threshold: bytes.
        name: of the file.
        suffix: what the name of a file of tensors has behind it.
    """
    data = f"{name}{suffix}"
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))
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
    models = [*map(model_file, ("", ENCODER, DECODER)), MERGED]
    data = (f"{name}{suffix}" for name in models for suffix in (DATA, OPTIMUM_DATA))
    return artifact_folder.write_assets(program, folder, (*models, *data, SHARED, GENAI))
