"""``manifest.json``: what an artifact is made of and by what; and the check of a folder's files against it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast

from pydantic import Field

from bitlower.backends.artifact.folder import CONFIG
from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.artifact.record import FILE as VERIFICATION
from bitlower.backends.artifact.resolved import float_bytes, resolved_tensors
from bitlower.backends.artifact.schema import parsed
from bitlower.ir import BitlowerError, CheckError, Length, Program
from bitlower.ir.files import is_file, open_regular, reason
from bitlower.ir.version import __version__

FILE = "manifest.json"
ALWAYS = (CONFIG, VERIFICATION)
"""Files that every artifact has."""
_LOADED = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.*", "vocab*.txt", "merges*.txt"),
    *("*.onnx", "*.onnx.data", "*.onnx_data", "*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth"),
    *("*.so", "*.dll", "*.dylib", "*.py", "*.cubin", "*.ptx"),
)
"""What something that loads an artifact would read where it lies in the folder."""


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ProgramEntry:
    """What was exported."""

    source: str
    task: str
    level: str
    passes: tuple[str, ...]
    digest: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What :func:`write_manifest` writes."""

    backend: str
    backend_options: Mapping[str, Any]
    provenance: Mapping[str, Any]
    versions: Mapping[str, str]
    program: ProgramEntry
    tensors: tuple[Mapping[str, Any], ...]
    files: Mapping[str, FileEntry]
    bytes: Annotated[int, Field(ge=0)]
    float_bytes: Annotated[int, Field(ge=0)]
    operators: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Files:
    """Files that are as the manifest says: how many, their bytes in all; and those that it does not know."""

    count: int
    bytes: int
    unlisted: tuple[str, ...]


def write_manifest(
    program: Program,
    folder: Path,
    *,
    backend: str,
    packages: Collection[str],
    backend_options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    operators: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json`` about all files that lie in ``folder`` now.

    Args:
        program: what was exported.
        folder: the artifact's.
        backend: the backend's name.
        packages: those whose versions the artifact depends on.
        backend_options: those of the export.
        provenance: seeds, hashes of data, and what else the caller knows; plain data.
        operators: what became of the program's operators, if the backend knows it; plain data.
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
            "lengths": {name: asdict(length) for name, length in sorted(program.lengths.items())},
        },
        "tensors": resolved_tensors(program),
        **({} if operators is None else {"operators": dict(operators)}),
        "files": files,
        "bytes": sum(file["bytes"] for file in files.values()),
        "float_bytes": float_bytes(program),
    }
    write_json(folder / FILE, form)


def add_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write more files into an artifact that is being made, and list them in its manifest, if that lists files.

    Args:
        folder: the artifact's.
        texts: by file name.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    form = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    if "files" not in form:
        return
    form["files"] = dict(sorted({**form["files"], **{name: describe_file(folder / name) for name in texts}}.items()))
    form["bytes"] = sum(file["bytes"] for file in form["files"].values())
    write_json(folder / FILE, form)


def versions(packages: Collection[str]) -> dict[str, str]:
    """The versions of this package, of Python and of ``packages``."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"bitlower": __version__, "python": python, **{name: version(name) for name in packages}}


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: the manifest is missing or damaged; the entry is named.
    """
    if not folder.is_dir():
        raise BitlowerError(f"there is no artifact at {folder}", hint="give the folder that an export wrote")
    return parsed(Manifest, read_json(folder / FILE), f"{FILE} in {folder}")


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


def lengths(folder: Path) -> dict[str, Length]:
    """Which sizes the dimensions of the inputs of the model in ``folder`` may have; nothing where there is no manifest.

    Raises:
        CheckError: the manifest is damaged.
    """
    if not (folder / FILE).is_file():
        return {}
    program = read_json(folder / FILE).get("program")
    lengths = program.get("lengths", {}) if isinstance(program, dict) else {}
    try:
        return {name: Length(**{key: _size(value) for key, value in form.items()}) for name, form in lengths.items()}
    except (TypeError, AttributeError, BitlowerError):
        raise CheckError(f"{FILE} in {folder} is damaged: its lengths are none") from None


def _size(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError
    return value


def check_artifact(folder: Path, needed: Collection[str] = ()) -> Files:
    """Hold the files of an artifact against its manifest; nothing of them is loaded.

    Args:
        folder: the artifact's.
        needed: files that are there and listed, besides those of every artifact.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: the manifest is missing or damaged, a file is missing or changed, or one that something would load
            is not listed: a change of it would not be seen.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    for name in (*needed, *ALWAYS):
        if name not in manifest.files:
            raise CheckError(f"{FILE} in {folder} does not list {name}")
    unlisted = tuple(sorted(set(list_files(folder)) - set(manifest.files)))
    for name in unlisted:
        if any(PurePosixPath(name).match(pattern) for pattern in _LOADED):
            raise CheckError(f"{FILE} in {folder} does not list {name}", hint="remove it: it is not the artifact's")
    return Files(len(manifest.files), sum(entry.bytes for entry in manifest.files.values()), unlisted)


def check_if_artifact(folder: Path) -> None:
    """:func:`check_artifact` for a folder that an export of ours wrote; folders of others have no manifest of ours.

    Raises:
        CheckError: it is one of ours, and not as it was written.
    """
    if is_artifact(folder):
        check_artifact(folder)


def is_artifact(folder: Path) -> bool:
    """Whether an export of ours wrote ``folder``, as far as the files that only we write say so."""
    if is_file(folder / VERIFICATION):
        return True
    try:
        return {"backend", "files"} <= read_json(folder / FILE).keys()
    except CheckError:
        return False


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or name == FILE:
        raise CheckError(f"{FILE} in {folder} names a file outside the folder: {name}")
    try:
        with open_regular(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise CheckError(f"{name} in {folder} has {size} bytes, the manifest says {entry.bytes}")
            if hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest() != entry.sha256:
                raise CheckError(f"{name} in {folder} was changed: its hash is not the manifest's")
    except FileNotFoundError:
        raise CheckError(f"{name} is missing in {folder}") from None
    except (OSError, ValueError) as error:
        raise CheckError(f"{name} in {folder} cannot be read: {reason(error)}") from None


def list_files(folder: Path) -> list[str]:
    """All files of an artifact but its manifest, relative to ``folder``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    return [path.relative_to(folder).as_posix() for path in paths]


def describe_file(path: Path) -> dict[str, Any]:
    """Its bytes and its SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
