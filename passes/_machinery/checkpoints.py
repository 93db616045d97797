"""Checkpoints inside a long pass: what is done is written to the work folder, so that a killed run goes on there.

The folder belongs to one pass with its parameters on one program and one set of data; the manager sees to that.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bitlower.ir.json_files import parse_json


@dataclass(frozen=True)
class Stored:
    """Tensors by name, and rows of plain data for a report."""

    tensors: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]


def load_checkpoint(folder: Path | None, name: str) -> Stored | None:
    """What was saved under ``name``; None if nothing was, or the file is damaged."""
    if folder is None:
        return None
    try:
        with safe_open(_path(folder, name), framework="pt") as file:
            rows = parse_json(file.metadata()["rows"], finite=False)
            return Stored({key: file.get_tensor(key).clone() for key in file.keys()}, rows)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def save_checkpoint(folder: Path | None, name: str, stored: Stored) -> None:
    """Write ``stored`` whole or not at all; nothing without a folder.

    Raises:
        OSError: the disk is full.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = save(stored.tensors, metadata={"rows": json.dumps(stored.rows)})
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, _path(folder, name))
        except BaseException:
            os.unlink(file.name)
            raise


def _path(folder: Path, name: str) -> Path:
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
