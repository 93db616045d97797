"""What every artefact's folder holds besides the model: the files of the model that only lie beside it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath
from typing import Any

from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import reason
from bitlower.ir.json_files import read_json

CONFIG = "config.json"
RESERVED = (CONFIG, "manifest.json", "verification.json", "ledger.json", "recipe.yaml")
"""Names that are ours in every artefact."""
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def write_assets(program: Program, folder: Path, reserved: Collection[str]) -> list[str]:
    """Write the tokenizer's files; their names.

    Raises:
        BitlowerError: a file would lie outside the folder, or over one of ours or of ``reserved``.
    """
    for name, data in sorted(program.assets.items()):
        if PurePath(name).name != name or name in (".", "..", *RESERVED, *reserved):
            raise BitlowerError(f"the file {name!r} of the model cannot lie in an artefact")
        temporary = folder / f".{name}.partial"
        try:
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return sorted(program.assets)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The model's configuration, and the tokenizer's files by name.

    Raises:
        BitlowerError: there is no configuration.
    """
    try:
        config = read_json(folder / CONFIG, finite=False)
    except (OSError, ValueError) as error:
        raise BitlowerError(f"{folder} holds no readable {CONFIG}: {reason(error)}") from None
    files = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    return config, {path.name: path.read_bytes() for path in files}


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
