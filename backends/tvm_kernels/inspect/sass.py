"""What NVIDIA's compiler makes of a kernel's CUDA source: registers, spills, shared memory, instructions."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitlower.backends.tvm_kernels.library.nvcc import REGISTERS, find_tool
from bitlower.ir import BitlowerError, CheckError
from bitlower.ir.scratch import scratch_folder

_FUNCTION = re.compile(r"Compiling entry function '(\w+)'")


_FACTS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spills": re.compile(r"(\d+) bytes spill stores"),
    "shared": re.compile(r"(\d+) bytes smem"),
}


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.4A)?)")


@dataclass(frozen=True)
class DeviceFunction:
    """A device function as compiled for one architecture.

    Args:
        name: its symbol.
        architecture: such as ``sm_80``.
        registers: of a thread.
        spills: bytes a thread stores because registers are short.
        shared: bytes of shared memory a block.
        instructions: how often each occurs in the machine code, by its mnemonic without modifiers (but ``IDP.4A``).
    """

    name: str
    architecture: str
    registers: int
    spills: int
    shared: int
    instructions: tuple[tuple[str, int], ...]


@cache
def device_functions(source: str, architecture: str) -> tuple[DeviceFunction, ...]:
    """Compile CUDA ``source`` and read what came of each of its kernels.

    Raises:
        BitlowerError: a tool is not installed.
        CheckError: the source does not compile.
    """
    tools = {name: find_tool(name) for name in ("nvcc", "cuobjdump", "nvdisasm")}
    for name, path in tools.items():
        if path is None:
            hint = "install CUDA's compiler" if name == "nvcc" else f"pip install nvidia-cuda-{name}"
            raise BitlowerError(f"{name} is needed to look at machine code, and not installed", hint=hint)
    with scratch_folder() as folder:
        cuda, made = folder / "kernel.cu", folder / "kernel.cubin"
        cuda.write_text(source, encoding="utf-8")
        options = [
            "-std=c++17",
            "-cubin",
            f"-arch={architecture}",
            "-Xptxas",
            "-v",
            *REGISTERS,
            "-w",
            "-o",
            str(made),
            str(cuda),
        ]
        log = _run([str(tools["nvcc"]), *options])
        search = os.pathsep.join([str(Path(str(tools["nvdisasm"])).parent), os.environ.get("PATH", "")])
        code = _run([str(tools["cuobjdump"]), "-sass", str(made)], PATH=search)
    return tuple(_read(name, architecture, part, code) for name, part in _sections(log, _FUNCTION))


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise CheckError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[:2000]}")
    return done.stdout + done.stderr


def _sections(text: str, header: re.Pattern[str]) -> list[tuple[str, str]]:
    """The parts of ``text`` from each match of ``header`` to the next, by what it names."""
    parts = header.split(text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _read(name: str, architecture: str, log: str, code: str) -> DeviceFunction:
    facts = {key: int(match[1]) if (match := pattern.search(log)) else 0 for key, pattern in _FACTS.items()}
    body = dict(_sections(code, re.compile(r"Function : (\w+)")))[name]
    counts = Counter(_INSTRUCTION.findall(body))
    return DeviceFunction(name, architecture, **facts, instructions=tuple(sorted(counts.items())))
