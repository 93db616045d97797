"""``manifest.json``: what an artefact is made of and by what; and the check of a folder's files against it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from bitlower.backends._json import read_json, write_json
from bitlower.backends._resolved import float_bytes, resolved_tensors
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.version import __version__

FILE = "manifest.json"


def write_manifest(
    program: Program,
    folder: Path,
    *,
    backend: str,
    packages: Collection[str],
    backend_options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json`` about all files that lie in ``folder`` now.

    Args:
        program: what was exported.
        folder: the artefact's.
        backend: the backend's name.
        packages: those whose versions the artefact depends on.
        backend_options: those of the export.
        provenance: seeds, hashes of data, and what else the caller knows; plain data.
    """
    files = {name: describe_file(folder / name) for name in list_files(folder)}
    form = {
        "backend": backend,
        "backend_options": dict(backend_options or {}),
        "provenance": dict(provenance or {}),
        "versions": versions(packages),
        "program": {
            "source": program.source,
            "task": program.task,
            "level": str(program.level),
            "passes": list(program.passes),
            "digest": program.digest(),
            "inputs": [str(spec) for spec in program.inputs],
            "outputs": [str(spec) for spec in program.outputs],
            "context_length": program.context_length,
        },
        "tensors": resolved_tensors(program),
        "files": files,
        "bytes": sum(file["bytes"] for file in files.values()),
        "float_bytes": float_bytes(program),
    }
    write_json(folder / FILE, form)


def versions(packages: Collection[str]) -> dict[str, str]:
    """The versions of this package, of Python and of ``packages``."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"bitlower": __version__, "python": python, **{name: version(name) for name in packages}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: the manifest is missing or damaged.
    """
    if not folder.is_dir():
        raise BitlowerError(f"there is no artefact at {folder}", hint="give the folder that an export wrote")
    return read_json(folder / FILE)


def context_length(folder: Path) -> int | None:
    """How many tokens the model in ``folder`` takes at once; None: no limit is known, or there is no manifest.

    Raises:
        CheckError: the manifest is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    program = read_json(folder / FILE).get("program")
    length = program.get("context_length") if isinstance(program, dict) else None
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise CheckError(f"{FILE} in {folder} is damaged: a context of {length!r} tokens")
    return length


def check_files(folder: Path, manifest: Mapping[str, Any], needed: Collection[str]) -> dict[str, int]:
    """The bytes of each listed file, all of which are there and as they were.

    Raises:
        CheckError: a file is missing or changed, one of ``needed`` is not listed, or the list is damaged.
    """
    sizes = {}
    try:
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckError(f"{FILE} in {folder} is damaged: {error!r}") from None
    for name, (size, digest) in listed.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise CheckError(f"{FILE} in {folder} names a file outside the folder: {name}")
        path = folder / name
        if not path.is_file():
            raise CheckError(f"{name} is missing in {folder}")
        if path.stat().st_size != size:
            raise CheckError(f"{name} in {folder} has {path.stat().st_size} bytes, the manifest says {size}")
        if describe_file(path)["sha256"] != digest:
            raise CheckError(f"{name} in {folder} was changed: its hash is not the manifest's")
        sizes[name] = size
    for name in needed:
        if name not in sizes:
            raise CheckError(f"{FILE} in {folder} does not list {name}")
    return sizes


def list_files(folder: Path) -> list[str]:
    """All files of an artefact but its manifest, relative to ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    return [path.relative_to(folder).as_posix() for path in paths]


def describe_file(path: Path) -> dict[str, Any]:
    """Its bytes and its SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
