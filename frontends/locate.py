"""Where a model lies: a folder, a GGUF file, or ``package:NAME`` for weights inside an installed package."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from bitlower.ir import BitlowerError, nearest
from bitlower.ir.assets import transformer_folder
from bitlower.ir.files import check_name

GGUF = ".gguf"
_PREFIX = "package:"


def locate(model: str | os.PathLike[str]) -> Path:
    """The folder that holds ``config.json``, or the GGUF file; an installed package is searched and never imported.

    That of a sentence-transformers model may be the folder of its transformer (``0_Transformer``).

    Raises:
        BitlowerError: no such folder, file or package, no configuration in it, or several GGUF files.
    """
    name = os.fspath(model)
    if name.startswith(_PREFIX):
        return _inside_package(name.removeprefix(_PREFIX))
    folder = check_name(name)
    if folder.is_file() and folder.suffix == GGUF:
        return folder
    if not folder.is_dir():
        raise BitlowerError(
            f"no model folder at {name!r}", hint="give a folder with config.json, a GGUF file, or package:NAME"
        )
    if (folder / "config.json").is_file():
        return folder
    if (inner := transformer_folder(folder)) is not None:
        return inner
    return _only_gguf(sorted(folder.glob(f"*{GGUF}")), f"{name!r} holds no config.json")


def _only_gguf(files: list[Path], lack: str) -> Path:
    """The one GGUF file of a place."""
    if not files:
        raise BitlowerError(lack, hint="it must be a Hugging Face model folder, or hold a GGUF file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BitlowerError(f"{files[0].parent} holds {len(files)} GGUF files: {names}", hint="name one of them")
    return files[0]


def _inside_package(name: str) -> Path:
    try:
        files = importlib.metadata.files(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        known = sorted({d.name for d in importlib.metadata.distributions() if d.name})
        close = nearest(name, known).partition("? ")[0]
        hint = f"{close}?" if close.startswith("did you mean") else f"install it: pip install --no-deps {name}"
        raise BitlowerError(f"no package {name!r} is installed", hint=hint) from None
    places = [Path(str(f.locate())) for f in files or []]
    folders = {place.parent for place in places if place.name == "config.json"}
    models = sorted(folder for folder in folders if any(folder.glob("*.safetensors*")))
    if len(models) > 1:
        raise BitlowerError(f"the package {name!r} holds {len(models)} folders with config.json and safetensors")
    lack = f"the package {name!r} holds no folder with config.json and safetensors"
    return models[0] if models else _only_gguf([place for place in places if place.suffix == GGUF], lack)
