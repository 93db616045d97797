"""``README.md`` of an artifact: the model card that the Hugging Face hub shows, made of what the folder holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlower.backends.artifact.manifest import list_files
from bitlower.backends.artifact.resolved import float_bytes
from bitlower.ir import Program
from bitlower.ir.json_files import read_json
from bitlower.ir.model_card import CARD, front_matter, with_front_matter
from bitlower.ir.tasks import CTC, SPEECH_RECOGNITION, TASKS
from bitlower.ir.version import __version__

LEDGER, RECIPE = "ledger.json", "recipe.yaml"
_HUB = re.compile(r"hf:(?P<id>[^@\s]+)|.*models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
"""Sources that name a model of the hub, by its name or by its folder in the hub's cache."""
_CONVERTED = ".gguf"
"""How a file ends that is another model's weights in another format; its card names that model."""
_CARRIED = ("license", "license_name", "license_link", "language")
"""What the source model's card says that holds for the artifact too."""
_PIPELINES = {CTC: SPEECH_RECOGNITION, "pre-training": ""}
"""What the hub calls tasks that it has under another name, or not at all."""
_FIGURES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the float model",
    "top1_agreement": "top-1 agreement",
    "kl_divergence": "KL divergence",
    "cosine": "cosine",
    "relative_error": "relative error",
}
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Usage:
    """How an artifact is loaded.

    Args:
        library: what the hub should call the library for it.
        code: Python that loads it from the folder ``folder`` and runs it.
        needs: packages to install, in words of pip.
        tags: of the format.
    """

    library: str
    code: str
    needs: str
    tags: tuple[str, ...] = ()


def write_card(program: Program, folder: Path, usage: Usage) -> str:
    """Write the card about what lies in ``folder`` now, where the model is; its name.

    Args:
        program: what was exported; among its assets may be the card of the model that it was made from.
        folder: the artifact's, without its manifest.
        usage: what the backend says of it.
    """
    stored = sum((folder / name).stat().st_size for name in list_files(folder) if name != CARD)
    schemes = _schemes(program)
    sections = [
        f"# {_title(program.source)}, quantized",
        _summary(program, schemes, stored),
        "## What it cost",
        _cost(folder),
        "## How to load it",
        f"```sh\npip install {usage.needs}\n```",
        f'```python\nfolder = "."  # where this file lies\n\n{usage.code.strip()}\n```',
        "## How it was made",
        _making(program, folder),
    ]
    text = with_front_matter(_front(program, usage, folder), "\n\n".join(sections) + "\n")
    (folder / CARD).write_text(text, encoding="utf-8")
    return CARD


def _front(program: Program, usage: Usage, folder: Path) -> dict[str, Any]:
    """What the hub reads of the card."""
    source = front_matter(program.assets.get(CARD, b""))
    base = _base_model(program.source)
    if not base and program.source.endswith(_CONVERTED):
        base = str(source.get("base_model", ""))
    bits = {quantizer.spec.grid.bits for _, quantizer in program.quantizers()}
    front: dict[str, Any] = {key: source[key] for key in _CARRIED if _is_plain(source.get(key))}
    stated = program.config.get("license")
    if "license" not in front and isinstance(stated, str):
        front["license"] = stated
    front |= {"base_model": base, "base_model_relation": "quantized" if base else ""}
    front |= {"library_name": usage.library, "pipeline_tag": _PIPELINES.get(program.task, program.task)}
    if program.task not in TASKS:
        front["pipeline_tag"] = ""
    front["tags"] = ["bitlower", "quantized", *usage.tags, *(f"{count}-bit" for count in sorted(bits))]
    front["metrics"] = sorted({name for loss in _losses(folder).values() for name in _FIGURES if name in loss})
    return front


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _base_model(source: str) -> str:
    """The hub's name of the model that ``source`` is; empty where it is another's."""
    match = _HUB.match(source)
    if match is None:
        return ""
    return match["id"] or f"{match['owner']}/{match['name']}"


def _title(source: str) -> str:
    """The model's name, without the folders above it."""
    return _base_model(source) or source.removeprefix("package:").rstrip("/").rpartition("/")[2] or "A model"


def _schemes(program: Program) -> dict[str, list[str]]:
    """The specs of each role, in words."""
    roles: dict[str, list[str]] = {}
    for _, quantizer in program.quantizers():
        specs = roles.setdefault(quantizer.role, [])
        if str(quantizer.spec) not in specs:
            specs.append(str(quantizer.spec))
    return dict(sorted(roles.items()))


def _summary(program: Program, schemes: Mapping[str, list[str]], stored: int) -> str:
    rows = [("made from", f"`{_title(program.source)}`"), ("task", program.task or "not named")]
    rows.append(("size", f"{float_bytes(program) / _MEGABYTE:.1f} MB in float32, {stored / _MEGABYTE:.1f} MB here"))
    rows += [(role, ", ".join(specs)) for role, specs in schemes.items()]
    if not schemes:
        rows.append(("scheme", "float: nothing is quantized"))
    return _table(("", ""), rows)


def _cost(folder: Path) -> str:
    losses = _losses(folder)
    if not losses:
        return f"There is no {LEDGER}: nothing lossy was done to the model, or it was not measured."
    names = [name for name in _FIGURES if any(name in loss for loss in losses.values())]
    rows = [(output, *(f"{loss[name]:g}" if name in loss else "" for name in names)) for output, loss in losses.items()]
    table = _table(("output", *(_FIGURES[name] for name in names)), rows)
    return f"Against the float model, on held-out data; what each step cost stands in `{LEDGER}`.\n\n{table}"


def _losses(folder: Path) -> dict[str, dict[str, float]]:
    """By output, what all lossy passes together cost."""
    try:
        rows = read_json(folder / LEDGER).get("rows", [])
    except FileNotFoundError:
        return {}
    outputs = rows[-1].get("outputs", {}) if rows else {}
    return {name: {key: value for key, value in loss.items() if value is not None} for name, loss in outputs.items()}


def _making(program: Program, folder: Path) -> str:
    lines = [f"By bitlower {__version__}, with the passes `{' '.join(program.passes)}`."]
    if (folder / RECIPE).is_file():
        lines.append(f"```sh\nbitlower run {RECIPE} -o DIR\n```")
    lines.append("`bitlower verify .` compares the files and the model with what was recorded when it was written.")
    return "\n\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(_lines([head, tuple("---" for _ in head), *rows]))


def _lines(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
