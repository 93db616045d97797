"""Where a model lies: a folder, a GGUF file, ``package:NAME`` of a package, or ``hf:ORG/NAME`` of the hub."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

from bitlower.frontends.hub import PREFIX, hub_folder, is_hub_name
from bitlower.ir import BitlowerError, nearest
from bitlower.ir.assets import transformer_folder
from bitlower.ir.files import check_name

GGUF = ".gguf"
"""How the files of llama.cpp end."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PREFIX = "package:"
FORMS = "a folder with config.json, a GGUF file, package:NAME of an installed package, or hf:ORG/NAME of the hub"
"""What names a model."""


def is_named(model: str) -> bool:
    """Whether ``model`` is a name, of a package or of the hub, and not a path."""
    return model.startswith(_PREFIX) or is_hub_name(model)


def missing(model: str) -> BitlowerError:
    """What to say where there is no model at the path ``model``; what looks like a name of the hub is taken for one."""
    on_the_hub = f"; if it is a model of the hub, write {PREFIX}{model}" if _HUB_NAME.fullmatch(model) else ""
    return BitlowerError(f"no model folder at {model!r}", hint=f"give {FORMS}{on_the_hub}")


def locate(model: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The folder that holds ``config.json``, or the GGUF file; an installed package is searched and never imported.

    That of a sentence-transformers model may be the folder of its transformer (``0_Transformer``).

    Args:
        model: as a user names it.
        weights: whether the weights have to be there too: those of a model of the hub are downloaded then.

    Raises:
        BitlowerError: no such folder, file or package, no configuration in it, or several GGUF files.
    """
    name = os.fspath(model)
    if name.startswith(_PREFIX):
        return _inside_package(name.removeprefix(_PREFIX))
    if is_hub_name(name):
        return _inside(hub_folder(name, weights=weights), name)
    folder = check_name(name)
    if folder.is_file() and folder.suffix == GGUF:
        return folder
    if not folder.is_dir():
        raise missing(name)
    return _inside(folder, name)


def check_place(model: str) -> None:
    """See that something lies at ``model``, unless it is a name; nothing is read.

    Raises:
        BitlowerError: there is nothing.
    """
    if not is_named(model) and not check_name(model).exists():
        raise missing(model)


def _inside(folder: Path, name: str) -> Path:
    """The part of ``folder`` that holds the model called ``name``."""
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
