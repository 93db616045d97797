"""The files of a library: the code with the weights, and what it takes, returns and runs on."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tvm
from pydantic import Field

from bitlower.backends.artifact import folder as artifact_folder
from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.artifact.schema import parsed
from bitlower.backends.artifact.selftest import Dtype
from bitlower.backends.tvm_kernels.library.compile import compile_program
from bitlower.backends.tvm_kernels.library.fatbin import write_code
from bitlower.backends.tvm_kernels.library.library import (
    LIBRARY,
    SIGNATURE,
    Code,
    Library,
    StagedLibrary,
    find_device,
    staged_library,
)
from bitlower.backends.tvm_kernels.relax.precision import AUTO
from bitlower.backends.tvm_kernels.spec.functions import MAIN
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog
from bitlower.backends.tvm_kernels.spec.target import TARGETS, Target, find_target
from bitlower.ir import BitlowerError, CheckError, Level, Program, TensorType, ValueSpec
from bitlower.ir.stages import DECODER, ENCODER

RESERVED = (LIBRARY, SIGNATURE)


@dataclass(frozen=True)
class Value:
    """An input or output of a library."""

    name: str
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)] | str, ...]

    def spec(self) -> ValueSpec:
        """Its name and type."""
        return ValueSpec(self.name, TensorType(getattr(torch, self.dtype), self.shape))


@dataclass(frozen=True)
class Function:
    """What a function of a library takes and returns, in order."""

    inputs: Annotated[tuple[Value, ...], Field(min_length=1)]
    outputs: Annotated[tuple[Value, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Operators:
    """What became of a Program's operators; see :class:`~bitlower.backends.tvm_kernels.spec.operators.OperatorLog`."""

    calls: dict[str, Annotated[int, Field(ge=0)]]
    compiled: dict[str, Annotated[int, Field(ge=0)]]
    float: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Signature:
    """What ``library.json`` holds: what is needed to run the library without the Program, and what it calls."""

    target: str
    processor: str
    task: str
    functions: dict[str, Function]
    operators: Operators

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"its target is {self.target}, none of {', '.join(TARGETS)}")
        if set(self.functions) not in ({MAIN}, {ENCODER, DECODER}):
            names = ", ".join(self.functions) or "none"
            raise ValueError(f"its functions are {names}, not {MAIN}, nor {ENCODER} and {DECODER}")


def write_library(
    program: Program, folder: Path, target: Target, activations: str = AUTO
) -> tuple[tuple[str, ...], Code]:
    """Compile ``program`` into ``folder``; the names of the files, each of which appears whole, and what was compiled.

    Raises:
        BitlowerError: the program cannot be compiled.
    """
    try:
        library = compile_program(program, target, activations=activations)
    except BitlowerError:
        raise
    except Exception as error:  # TVM raises many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BitlowerError(f"TVM does not compile the program: {line}", hint="export to another backend") from error
    with tempfile.TemporaryDirectory(prefix=".library-", dir=folder) as scratch:
        path = Path(scratch) / LIBRARY
        further = write_code(library.code.executable, target, path)
        for name, text in further.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        for name in (LIBRARY, *further):
            artifact_folder.flush(Path(scratch) / name)
            (Path(scratch) / name).replace(folder / name)
    write_json(folder / SIGNATURE, _signature(library))
    return (*RESERVED, *further), library.code


def _signature(library: Library | StagedLibrary) -> dict[str, Any]:
    """What is needed to run the library without the Program."""
    functions = {MAIN: library.program} if isinstance(library, Library) else library.stages
    return {
        "target": str(library.code.target),
        "processor": processor() if library.code.target.features else "",
        "task": library.program.task,
        "operators": library.code.operators.to_dict(),
        "functions": {
            name: {"inputs": [*map(_encode, part.inputs)], "outputs": [*map(_encode, part.outputs)]}
            for name, part in functions.items()
        },
    }


def processor() -> str:
    """The name of this processor, as LLVM calls it."""
    return str(tvm.target.codegen.llvm_get_system_cpu())


def _encode(spec: ValueSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": str(spec.type.dtype).removeprefix("torch."),
        "shape": list(spec.type.shape),
    }


def load_library(folder: Path) -> Library | StagedLibrary:
    """The library that :func:`write_library` wrote; its files are taken as they are.

    Raises:
        BitlowerError: it is code for another processor, or for a GPU that is not here.
        CheckError: a file is missing or damaged.
    """
    signature = parsed(Signature, read_json(folder / SIGNATURE), f"{SIGNATURE} in {folder}")
    target, wanted = find_target(signature.target), signature.processor
    if wanted and wanted != processor():
        raise BitlowerError(
            f"{folder} holds code for {wanted}, and this is {processor()}",
            hint=f"export for the target `{Target.LLVM}`, which runs on any",
        )
    find_device(target)
    if not (folder / LIBRARY).is_file():
        raise CheckError(f"{LIBRARY} is missing in {folder}")
    try:
        module = tvm.runtime.load_module(str(folder / LIBRARY))
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckError(f"{LIBRARY} in {folder} does not load: {str(error).splitlines()[0]}") from None
    model = artifact_folder.read_model(folder)
    limits: dict[str, Any] = {
        "context_length": artifact_manifest.context_length(folder),
        "lengths": artifact_manifest.lengths(folder),
    }
    operators = OperatorLog.from_dict(asdict(signature.operators))
    code, shells = Code(module, target, operators), dict[str, Program]()
    for name, function in signature.functions.items():
        inputs, outputs = (tuple(value.spec() for value in side) for side in (function.inputs, function.outputs))
        shells[name] = Program({}, Level.FUSED, signature.task, inputs, outputs, *model, str(folder), **limits)
    return Library(code, shells[MAIN]) if MAIN in shells else staged_library(code, shells[DECODER], shells)
