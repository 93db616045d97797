"""Device functions in CUDA C++, run on the CPU: compiled by g++ over ``fibers.h``, for float16 and matrix instructions.

Races are not found: threads take turns only at barriers and shuffles.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = {"kind": "cuda", "arch": "sm_80"}
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([\d, ]+\) (\w+)\(([^)]*)\) \{')


def build(source: str) -> dict[str, Callable[..., None]]:
    """A launcher for each kernel of ``source``.

    What stands before the first kernel is about CUDA's own headers, and left out.
    """
    code = source[source.index('extern "C" __global__') :]
    kernels = {name: [part.rsplit(" ", 1)[0] for part in given.split(", ")] for name, given in _KERNEL.findall(code)}
    entries = "\n".join(_entry(name, kinds) for name, kinds in kernels.items())
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        path.write_text(f'#include "fibers.h"\n{code}\n{entries}\n')
        command = ["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
        subprocess.run([*command, "-o", str(library), str(path)], check=True)
        loaded = ctypes.CDLL(str(library))
    return {name: _launcher(loaded[f"run_{name}"], kinds) for name, kinds in kernels.items()}


def _entry(name: str, kinds: list[str]) -> str:
    given = ", ".join(f"*({kind.replace('__restrict__', '')}*)given[{at}]" for at, kind in enumerate(kinds))
    return (
        f'extern "C" void run_{name}(void** given, const int* blocks, const int* threads) '
        f"{{ launch(blocks, threads, [=] {{ {name}({given}); }}); }}"
    )


def _launcher(function: Any, kinds: list[str]) -> Callable[..., None]:
    def launch(given: list[Any], blocks: list[int], threads: list[int]) -> None:
        held = [
            ctypes.c_void_p(value.value) if "*" in kind else ctypes.c_int64(int(value))
            for kind, value in zip(kinds, given, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        function(pointers, (ctypes.c_int * 3)(*blocks), (ctypes.c_int * 3)(*threads))

    return launch
