"""JSON files of an artifact: equal contents give equal bytes, and a file appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlower.ir import CheckError, json_files
from bitlower.ir.digits import rounded
from bitlower.ir.files import reason


def write_json(path: Path, form: Mapping[str, Any]) -> None:
    """Write ``form`` with sorted keys; a reader sees the old file or the new one."""
    text = plain_text(form)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain_text(form: Any) -> str:
    """``form``, plain data without NaN or Inf, as JSON with sorted keys."""
    return json.dumps(form, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in ``path``.

    Raises:
        CheckError: the file is missing or damaged.
    """
    try:
        return json_files.read_json(path)
    except FileNotFoundError:
        raise CheckError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise CheckError(f"{path.name} in {path.parent} is damaged: {reason(error)}") from None


def rounded_figures(form: Mapping[str, Any]) -> dict[str, Any]:
    """``form`` with six significant digits of its floats."""
    return {key: rounded(value) if isinstance(value, float) else value for key, value in form.items()}
