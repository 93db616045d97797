"""What every artifact's folder holds besides the model: the files of the model that only lie beside it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from bitlower.ir import BitlowerError, Level, Program
from bitlower.ir.assets import is_inside, read_assets
from bitlower.ir.files import reason
from bitlower.ir.json_files import read_json
from bitlower.ir.model_card import CARD

CONFIG = "config.json"
RESERVED = (CONFIG, "manifest.json", "verification.json", "ledger.json", "recipe.yaml")
"""Names that are ours in every artifact, besides that of the card, which is made of the model's own."""


def write_assets(program: Program, folder: Path, reserved: Collection[str]) -> list[str]:
    """Write what lies beside the model, such as its tokenizer's files, but for its card; their names.

    Raises:
        BitlowerError: a file would lie outside the folder, or over one of ours or of ``reserved``.
    """
    files = {name: data for name, data in sorted(program.assets.items()) if name != CARD}
    for name, data in files.items():
        if not is_inside(name) or name in (*RESERVED, *reserved):
            raise BitlowerError(f"the file {name!r} of the model cannot lie in an artifact")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return list(files)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The model's configuration, and the files beside it that go along with it, by name; not the artifact's own card.

    Raises:
        BitlowerError: there is no configuration.
    """
    try:
        config = read_json(folder / CONFIG, finite=False)
    except (OSError, ValueError) as error:
        raise BitlowerError(f"{folder} holds no readable {CONFIG}: {reason(error)}") from None
    return config, {name: data for name, data in read_assets(folder).items() if name != CARD}


def shell(folder: Path) -> Program:
    """A Program without graphs: what tokenizing needs of an artifact.

    Raises:
        BitlowerError: there is no configuration.
    """
    config, files = read_model(folder)
    return Program({}, Level.FLOAT, "", (), (), config, files, str(folder))


def sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes by file name."""
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def flush(path: Path) -> None:
    """Bring what was written to ``path`` onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
