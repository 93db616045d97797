"""``manifest.json``: what an artefact is made of and by what; and the check of an artefact against it.

An artefact is checked without the Program: every file has the size and the hash that the manifest says, onnxruntime
loads the model and runs as many integer kernels as at export, and on the inputs kept in ``verification.json`` the model
gives what it gave when it was compared with the Program.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from bitlower.backends.onnx_qdq._json import read_json, significant, write_json
from bitlower.backends.onnx_qdq._kernels import KernelReport, count_kernels, optimized_graph
from bitlower.backends.onnx_qdq._resolved import float_bytes, resolved_tensors
from bitlower.backends.onnx_qdq._selftest import run_selftest
from bitlower.backends.onnx_qdq._session import Session, runtime_versions
from bitlower.backends.onnx_qdq._verification import Verification, read_verification
from bitlower.backends.onnx_qdq._verify import MODEL
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.version import __version__

FILE = "manifest.json"
BACKEND = "onnx-qdq"
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime")
SELFTEST = 0.9
"""The least cosine of an output to the recorded one. The same runtime on the same processor gives 1; others round ties
otherwise, and quantized models make that visible; a processor whose integer kernels saturate gives far less."""


@dataclass(frozen=True)
class ArtefactReport:
    """A sound artefact.

    Args:
        files: how many there are.
        bytes: of all of them.
        unlisted: files that the manifest does not know.
        runtime: the runtime's version and provider here.
        recorded_runtime: those of the export.
        kernels: what the runtime runs here.
        selftest: the cosine of each output to the recorded one.
    """

    files: int
    bytes: int
    unlisted: tuple[str, ...]
    runtime: Mapping[str, str]
    recorded_runtime: Mapping[str, str]
    kernels: KernelReport
    selftest: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        selftest = {name: significant(value) for name, value in self.selftest.items()}
        return {
            **asdict(self),
            "unlisted": list(self.unlisted),
            "kernels": self.kernels.to_dict(),
            "selftest": selftest,
        }


def write_manifest(
    program: Program,
    folder: Path,
    *,
    backend_options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json`` about all files that lie in ``folder`` now.

    Args:
        program: what was exported.
        folder: the artefact's.
        backend_options: those of the export.
        provenance: seeds, hashes of data, and what else the caller knows; plain data.
    """
    files = {path.relative_to(folder).as_posix(): _file(path) for path in _files(folder)}
    form = {
        "backend": BACKEND,
        "backend_options": dict(backend_options or {}),
        "provenance": dict(provenance or {}),
        "versions": versions(),
        "program": {
            "source": program.source,
            "task": program.task,
            "level": str(program.level),
            "passes": list(program.passes),
            "digest": program.digest(),
            "inputs": [str(spec) for spec in program.inputs],
            "outputs": [str(spec) for spec in program.outputs],
        },
        "tensors": resolved_tensors(program),
        "files": files,
        "bytes": sum(file["bytes"] for file in files.values()),
        "float_bytes": float_bytes(program),
    }
    write_json(folder / FILE, form)


def versions() -> dict[str, str]:
    """The versions of all that an artefact depends on."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"bitlower": __version__, "python": python, **{name: version(name) for name in PACKAGES}}


def verify_artefact(folder: Path) -> ArtefactReport:
    """Check an artefact on the disk against what was recorded when it was written.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: a file is missing or changed, the model does not load, or does not compute what it did.
    """
    if not folder.is_dir():
        raise BitlowerError(f"there is no artefact at {folder}", hint="give the folder that an export wrote")
    manifest = read_json(folder / FILE)
    files = _check_files(folder, manifest)
    recorded = read_verification(folder)
    path = folder / MODEL
    kernels = count_kernels(optimized_graph(path, recorded.session_config), expected=recorded.kernels.expected)
    _check_kernels(kernels, recorded)
    selftest = run_selftest(recorded.selftest, Session(path, config=recorded.session_config))
    for name, cosine in selftest.items():
        if not cosine >= SELFTEST:
            raise CheckError(f"the output {name} has the cosine {cosine:.3g} to what was recorded at export")
    present = {file.relative_to(folder).as_posix() for file in _files(folder)}
    unlisted = tuple(sorted(present - set(files)))
    return ArtefactReport(
        len(files), sum(files.values()), unlisted, runtime_versions(), recorded.runtime, kernels, selftest
    )


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """The bytes of each listed file.

    Raises:
        CheckError: a file is missing or changed, or the list is damaged.
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
        if _file(path)["sha256"] != digest:
            raise CheckError(f"{name} in {folder} was changed: its hash is not the manifest's")
        sizes[name] = size
    for needed in (MODEL, "verification.json"):
        if needed not in sizes:
            raise CheckError(f"{FILE} in {folder} does not list {needed}")
    return sizes


def _check_kernels(kernels: KernelReport, recorded: Verification) -> None:
    """The same runtime must choose the same kernels; another version may differ, and its report says so."""
    same = dict(recorded.runtime) == runtime_versions()
    if same and kernels.integer != dict(recorded.kernels.integer):
        raise CheckError(
            f"onnxruntime runs {kernels.found} integer kernels of {MODEL}, {recorded.kernels.found} at export",
            hint="another processor or session option changes what the runtime fuses",
        )


def _files(folder: Path) -> list[Path]:
    """All files of an artefact but its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
