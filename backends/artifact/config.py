"""``config.json`` of artifacts of formats of our own: the model's, with what is quantized and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitlower.backends.artifact.folder import CONFIG
from bitlower.backends.artifact.json_files import write_json
from bitlower.ir import Program, QuantSpec
from bitlower.ir.version import __version__

METHOD = "bitlower"


def write_config(program: Program, folder: Path, format: str) -> str:
    """Write ``config.json``: the model's own, and what is quantized and how, in ``format``; its name."""
    write_json(folder / CONFIG, {**program.config, "quantization_config": quantization_config(program, format)})
    return CONFIG


def quantization_config(program: Program, format: str) -> dict[str, Any]:
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
        "format": format,
        "quantization_status": "compressed" if roles else "float",
        "config_groups": groups,
        "roles": {role: [spec.to_dict() for spec in specs] for role, specs in sorted(roles.items())},
    }
