"""A compiled Program as a folder: the library, what it takes and gives, and a check that it computes what it did."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

from bitlower.backends import _folder, _manifest
from bitlower.backends._json import read_json, significant, write_json
from bitlower.backends.tvm_kernels._cpu_frame import host_target
from bitlower.backends.tvm_kernels._relax import Library, compile_program
from bitlower.backends.tvm_kernels._spec import Target
from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program, TensorType, ValueSpec

LIBRARY, SIGNATURE, VERIFICATION = "library.so", "library.json", "verification.json"
BACKEND = "tvm-kernels"
PACKAGES = ("torch", "transformers", "apache-tvm", "apache-tvm-ffi")
COSINE = 0.9
"""The least cosine between an output of the library and the Program's: ties of float arithmetic flip codes, and where
every value is quantized with one scale a tensor that is well visible; a fault gives far less."""
ROWS, LENGTH, VALUES = 2, 16, 64


@dataclass(frozen=True)
class LibraryReport:
    """A library that computes what its Program does.

    Args:
        target: whose code it is.
        files: bytes by name.
        outputs: of each output the largest error over its standard deviation, and the cosine.
    """

    target: str
    files: Mapping[str, int]
    outputs: Mapping[str, Mapping[str, float]]


def write_library(
    program: Program,
    folder: Path,
    batches: Sequence[Batch],
    *,
    target: Target | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> LibraryReport:
    """Compile ``program`` into the existing ``folder`` and compare what lies there with it on ``batches``.

    Args:
        program: at level fused.
        folder: exists.
        batches: real inputs; the first also makes the self-test.
        target: a CPU; None: the best that this processor has.
        provenance: for the manifest; plain data.

    Raises:
        BitlowerError: there is no batch, or the program cannot be compiled.
        CheckError: the library does not compute what the program does.
    """
    if not batches:
        raise BitlowerError("an export cannot be verified without a batch of inputs", hint="give at least one")
    target = target or host_target()
    _write_executable(compile_program(program, target).executable, folder)
    write_json(folder / SIGNATURE, _signature(program, target))
    write_json(folder / _folder.CONFIG, program.config)
    names = [LIBRARY, SIGNATURE, _folder.CONFIG, *_folder.write_assets(program, folder, (LIBRARY, SIGNATURE))]
    library = load_library(folder)
    small = _small(program, batches[0])
    errors = _compare(program, library, [small, *batches])
    selftest = {name: _sample(value) for name, value in library(**small).items()}
    inputs = {name: _plain(tensor) for name, tensor in small.items()}
    form = {"outputs": errors, "selftest": {"inputs": inputs, "outputs": selftest}, "batches": len(batches) + 1}
    write_json(folder / VERIFICATION, form)
    options = {"target": str(target)}
    _manifest.write_manifest(
        program, folder, backend=BACKEND, packages=PACKAGES, backend_options=options, provenance=provenance
    )
    return LibraryReport(str(target), _folder.sizes(folder, names), errors)


def _write_executable(executable: Any, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".library-", dir=folder) as scratch:
        path = Path(scratch) / LIBRARY
        executable.export_library(str(path))
        _folder.flush(path)
        path.replace(folder / LIBRARY)


def _signature(program: Program, target: Target) -> dict[str, Any]:
    """What is needed to run the library without the Program."""
    return {
        "target": str(target),
        "processor": _processor() if target is Target.VNNI else "",
        "task": program.task,
        "inputs": [_encode(spec) for spec in program.inputs],
        "outputs": [_encode(spec) for spec in program.outputs],
    }


def _processor() -> str:
    return str(tvm.target.codegen.llvm_get_system_cpu())


def _encode(spec: ValueSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": str(spec.type.dtype).removeprefix("torch."),
        "shape": list(spec.type.shape),
    }


def _decode(form: Mapping[str, Any]) -> ValueSpec:
    return ValueSpec(str(form["name"]), TensorType(getattr(torch, form["dtype"]), tuple(form["shape"])))


def load_library(folder: Path) -> Library:
    """The library that :func:`write_library` wrote.

    Raises:
        BitlowerError: it is code for another processor.
        CheckError: a file is missing or damaged.
    """
    form = read_json(folder / SIGNATURE)
    try:
        inputs, outputs = (tuple(_decode(spec) for spec in form[name]) for name in ("inputs", "outputs"))
        processor, task = str(form["processor"]), str(form["task"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckError(f"{SIGNATURE} in {folder} is damaged: {error!r}") from None
    if processor and processor != _processor():
        raise BitlowerError(
            f"{folder} holds code for {processor}, and this is {_processor()}",
            hint=f"export for the target `{Target.LLVM}`, which runs on any",
        )
    if not (folder / LIBRARY).is_file():
        raise CheckError(f"{LIBRARY} is missing in {folder}")
    try:
        module = tvm.runtime.load_module(str(folder / LIBRARY))
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckError(f"{LIBRARY} in {folder} does not load: {str(error).splitlines()[0]}") from None
    return Library(module, Program({}, Level.FUSED, task, inputs, outputs))


def verify_library(folder: Path) -> dict[str, float]:
    """Check a folder without the Program; the cosine of each output to what was recorded at export.

    Raises:
        BitlowerError: there is no such folder, or it is code for another processor.
        CheckError: a file is missing or changed, or the library gives something else than it did.
    """
    _manifest.check_files(folder, _manifest.read_manifest(folder), (LIBRARY, SIGNATURE, VERIFICATION))
    library, form = load_library(folder), read_json(folder / VERIFICATION)
    try:
        selftest = form["selftest"]
        inputs = {spec.name: _tensor(selftest["inputs"][spec.name], spec) for spec in library.program.inputs}
        recorded = {name: np.asarray(values, np.float64) for name, values in selftest["outputs"].items()}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckError(f"{VERIFICATION} in {folder} is damaged: {error!r}") from None
    found = library(**inputs)
    cosines = {}
    for name, values in recorded.items():
        cosines[name] = _cosine(np.asarray(_sample(found[name]), np.float64), values)
        _require(name, cosines[name], "what was recorded at export")
    return cosines


def _require(name: str, cosine: float, what: str) -> None:
    if not cosine >= COSINE:
        raise CheckError(f"the output {name} of the library has the cosine {cosine:.3g} to {what}")


def _small(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    """A part of ``batch``: at most so many rows, tokens of a sequence, and no past."""
    held = {name: batch[name] for name in batch if "past" not in _spec(program, name).type.shape}
    cut = {name: tensor[:ROWS, :LENGTH] for name, tensor in held.items()}
    return {name: tensor.contiguous() for name, tensor in program.complete(cut).items()}


def _spec(program: Program, name: str) -> ValueSpec:
    return next(spec for spec in program.inputs if spec.name == name)


def _plain(tensor: torch.Tensor) -> Any:
    return tensor.tolist() if tensor.numel() else {"shape": list(tensor.shape)}


def _tensor(form: Any, spec: ValueSpec) -> torch.Tensor:
    if isinstance(form, Mapping):
        return torch.zeros(form["shape"], dtype=spec.type.dtype)
    return torch.tensor(form, dtype=spec.type.dtype)


def _sample(value: torch.Tensor) -> list[float]:
    """Entries of an output at even distances."""
    flat = value.double().flatten()
    places = torch.linspace(0, max(len(flat) - 1, 0), min(VALUES, len(flat))).long()
    return [significant(entry) for entry in flat[places].tolist()]


def _compare(program: Program, library: Library, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """The worst figures of each output over all batches."""
    errors: dict[str, dict[str, float]] = {}
    for batch in batches:
        with torch.no_grad():
            expected = program(**batch)
        found = library(**batch)
        for name, value in expected.items():
            if not value.numel():
                continue
            first, second = value.double().numpy(), found[name].double().numpy()
            cosine = _cosine(first, second)
            _require(name, cosine, "the program's")
            relative = float(np.abs(first - second).max() / (first.std() or 1.0))
            row = errors.setdefault(name, {"relative": 0.0, "cosine": 1.0})
            row["relative"] = significant(max(row["relative"], relative))
            row["cosine"] = significant(min(row["cosine"], cosine))
    return errors


def _cosine(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / size if size else float(np.array_equal(first, second))
