"""The artefact's folder, laid out as Hugging Face does: the model, config.json and the tokenizer's files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bitlower.backends import _folder
from bitlower.backends._folder import CONFIG, flush
from bitlower.backends._json import write_json
from bitlower.ir import Program, QuantSpec
from bitlower.ir.version import __version__

MODEL, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
METHOD = "bitlower"


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
    return _folder.write_assets(program, folder, (MODEL, DATA, GENAI))
