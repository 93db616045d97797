"""The artefact's folder, laid out as Hugging Face does: the model, config.json and the tokenizer's files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import onnx_ir as ir

from bitlower.backends.onnx_qdq._json import write_json
from bitlower.ir import BitlowerError, Program, QuantSpec
from bitlower.ir.version import __version__

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "config.json"
METHOD = "bitlower"
_RESERVED = (MODEL, DATA, CONFIG, "manifest.json", "verification.json", "ledger.json", "recipe.yaml")


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
            _flush(Path(scratch) / name)
            (Path(scratch) / name).replace(folder / name)
    return names


def write_config(program: Program, folder: Path) -> str:
    """Write ``config.json``: the model's own, and what is quantized and how."""
    write_json(folder / CONFIG, {**program.config, "quantization_config": quantization_config(program)})
    return CONFIG


def quantization_config(program: Program) -> dict[str, Any]:
    """The scheme in compressed-tensors' terms: a group for each set of weights that is treated alike.

    ``input_activations`` of a group is what the linears read; ``roles`` holds the spec of every role of ours.
    """
    roles: dict[str, list[QuantSpec]] = {}
    targets: dict[QuantSpec, set[str]] = {}
    for _, quantizer in program.quantizers():
        specs = roles.setdefault(quantizer.role, [])
        if quantizer.spec not in specs:
            specs.append(quantizer.spec)
        if quantizer.role == "linear-weight":
            targets.setdefault(quantizer.spec, set()).add(quantizer.tensor.removesuffix(".weight"))
    inputs = roles.get("linear-input", [])
    groups = {
        f"group_{i}": {
            "targets": sorted(names),
            "weights": spec.to_dict(),
            "input_activations": inputs[0].to_dict() if len(inputs) == 1 else None,
        }
        for i, (spec, names) in enumerate(sorted(targets.items(), key=lambda item: min(item[1])))
    }
    return {
        "quant_method": METHOD,
        "version": __version__,
        "format": "onnx",
        "quantization_status": "compressed" if roles else "float",
        "config_groups": groups,
        "roles": {role: [spec.to_dict() for spec in specs] for role, specs in sorted(roles.items())},
    }


def write_assets(program: Program, folder: Path) -> list[str]:
    """Write the tokenizer's files; their names.

    Raises:
        BitlowerError: a file would lie outside the folder, or over one of ours.
    """
    for name, data in sorted(program.assets.items()):
        if PurePath(name).name != name or name in (".", "..") or name in _RESERVED:
            raise BitlowerError(f"the file {name!r} of the model cannot lie in an artefact")
        temporary = folder / f".{name}.partial"
        try:
            temporary.write_bytes(data)
            _flush(temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return sorted(program.assets)


def sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes by file name."""
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
