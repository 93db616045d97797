"""A compiled Program for NVIDIA GPUs as a library that holds machine code, made on a machine that may have no GPU.

Without NVIDIA's driver TVM keeps the CUDA source of the device functions and does not compile it. Here the source is
compiled by nvcc, for all architectures at once, and takes its place in what TVM packs into a library: a sequence of
modules, each a kind and its bytes, those of CUDA being a format, the functions, and the code. All lengths are 8 bytes,
lowest first. (TVM 0.27; another version is refused by the check of the pins.)
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from bitlower.backends.tvm_kernels.internals import packed_modules, with_code
from bitlower.backends.tvm_kernels.library.nvcc import REGISTERS, find_tool
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.ir import BitlowerError, CheckError
from bitlower.ir.scratch import scratch_folder

ARCHITECTURES = ("sm_80", "sm_90")
SOURCE = "kernels.cu"
_SYMBOL = "__tvm_ffi__library_bin"
_ASSEMBLY = f"""
    .section .rodata
    .globl {_SYMBOL}
    .balign 16
{_SYMBOL}:
    .incbin "{{path}}"
    .section .note.GNU-stack,"",%progbits
"""


def require_nvcc() -> str:
    """Where NVIDIA's compiler is.

    Raises:
        BitlowerError: it is not installed.
    """
    path = find_tool("nvcc")
    if path is None:
        raise BitlowerError("libraries for CUDA are compiled by nvcc, which is not installed", hint="install CUDA")
    return path


@cache
def compile_source(source: str) -> bytes:
    """The machine code of CUDA ``source`` for all of :data:`ARCHITECTURES`, and PTX for later ones: a fatbin.

    Raises:
        BitlowerError: nvcc is not installed.
        CheckError: the source does not compile.
    """
    numbers = [name.removeprefix("sm_") for name in ARCHITECTURES]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    codes.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    with scratch_folder() as folder:
        (folder / SOURCE).write_text(source, encoding="utf-8")
        command = [require_nvcc(), "-std=c++17", "-O3", "-w", *REGISTERS, "-fatbin", *codes, "-o", "kernels.fatbin"]
        command.append(SOURCE)
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise CheckError(f"nvcc failed: {(done.stderr or done.stdout).strip()[:2000]}")
        return (folder / "kernels.fatbin").read_bytes()


def device_module(executable: Any) -> Any:
    """The module of the device functions of a compiled Program.

    Raises:
        CheckError: it has none.
    """
    waiting = [executable.mod]
    while waiting:
        module = waiting.pop()
        if module.kind in ("cuda", "opencl"):
            return module
        waiting += list(module.imports)
    raise CheckError("a library for a GPU has no device functions")


def write_code(executable: Any, target: Target, path: Path) -> dict[str, str]:
    """Write a compiled Program as a library; the text of further files that belong to it, by name: the CUDA source.

    Raises:
        BitlowerError: the target is CUDA, and nvcc is not installed.
        CheckError: the source does not compile.
    """
    if target.kind == "cuda":
        return {SOURCE: export_cuda(executable, path)}
    executable.export_library(str(path))
    return {}


def export_cuda(executable: Any, path: Path) -> str:
    """Write a compiled Program as a library with machine code; its CUDA source.

    Raises:
        BitlowerError: nvcc is not installed.
        CheckError: the source does not compile.
    """
    source = str(device_module(executable).inspect_source())
    code = compile_source(source)

    def pack(module: Any, _: bool, __: str, folder: str) -> str:
        binary, assembly = Path(folder) / "modules.bin", Path(folder) / "modules.S"
        binary.write_bytes(with_code(packed_modules(module), source.encode(), code))
        assembly.write_text(_ASSEMBLY.format(path=binary))
        return str(assembly)

    executable.mod.export_library(str(path), fpack_imports=pack)
    return source
