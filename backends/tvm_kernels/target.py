"""Whose code: the targets, what TVM calls them, and the devices that run them."""

from __future__ import annotations

from typing import Any

import tvm

from bitlower.backends.tvm_kernels.spec.base import Target


def tvm_target(target: Target) -> Any:
    """The TVM target of a CPU kernel: the processor that this is run on.

    The generic target is told no processor, so that what it makes runs on all of its kind.
    """
    if target is Target.LLVM:
        return tvm.target.Target({"kind": "llvm"})
    return tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})


def host_target() -> Target:
    """What this processor can run: :attr:`Target.VNNI` where it has AVX512-VNNI, else :attr:`Target.LLVM`."""
    codegen = tvm.target.codegen
    host = tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    needed = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
    return Target.VNNI if all(codegen.target_has_features(name, host) for name in needed) else Target.LLVM


_THREADS = 256
"""Of a block: TVM's rule takes the most that the target allows."""


def gpu_target(target: Target, architecture: str = "sm_80") -> Any:
    """The TVM target of a GPU, with the host's code for this processor's kind."""
    kinds: dict[Target, dict[str, Any]] = {
        Target.CUDA: {"kind": "cuda", "arch": architecture, "max_num_threads": _THREADS},
        Target.OPENCL: {"kind": "opencl", "thread_warp_size": 1, "max_num_threads": _THREADS},
    }
    return tvm.target.Target(kinds[target], host={"kind": "llvm"})
