"""Device functions in OpenCL C, run on the CPU by PoCL: real work-items and barriers, but no float16, no matrices."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_HOME = importlib.util.find_spec("pyopencl")
assert _HOME is not None
assert _HOME.origin is not None
_LIBRARIES = Path(_HOME.origin).parent / ".libs"
if (_LIBRARIES / "pocl.icd").is_file():  # that of the package pocl-binary-distribution; else the system's
    os.environ.setdefault("OCL_ICD_VENDORS", str(_LIBRARIES / "pocl.icd"))

cl: Any = importlib.import_module("pyopencl")

TARGET = {"kind": "opencl", "max_num_threads": 1024, "thread_warp_size": 1}
PREAMBLE = """
inline int __dp4a(int a, int b, int c) {
  char4 x = as_char4(a), y = as_char4(b);
  return c + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
"""
_SCALARS = {"int": np.int32, "uint": np.uint32, "long": np.int64, "float": np.float32}
_LIBRARY = ctypes.CDLL(str(next(_LIBRARIES.glob("libOpenCL*"), "libOpenCL.so.1")))
_LIBRARY.clSetKernelArgSVMPointer.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p]
_DEVICE = next(device for platform in cl.get_platforms() for device in platform.get_devices())
_CONTEXT = cl.Context([_DEVICE])
_QUEUE = cl.CommandQueue(_CONTEXT)


def build(source: str) -> dict[str, Callable[..., None]]:
    """A launcher for each kernel of ``source``."""
    program = cl.Program(_CONTEXT, PREAMBLE + source).build(options=["-cl-kernel-arg-info", "-cl-opt-disable"])
    return {kernel.function_name: _launcher(kernel) for kernel in program.all_kernels()}


def _launcher(kernel: Any) -> Callable[..., None]:
    names = [kernel.get_arg_info(at, cl.kernel_arg_info.TYPE_NAME) for at in range(kernel.num_args)]

    def launch(given: list[Any], blocks: list[int], threads: list[int]) -> None:
        for at, (kind, value) in enumerate(zip(names, given, strict=True)):
            if kind.endswith("*"):
                pointer = ctypes.c_void_p(value.value)
                assert _LIBRARY.clSetKernelArgSVMPointer(ctypes.c_void_p(kernel.int_ptr), at, pointer) == 0
            else:
                kernel.set_arg(at, _SCALARS[kind](value))
        cl.enqueue_nd_range_kernel(_QUEUE, kernel, [b * t for b, t in zip(blocks, threads, strict=True)], threads)
        _QUEUE.finish()

    return launch
