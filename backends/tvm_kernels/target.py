"""Targets in TVM: what it calls them, and which of them this machine is."""

from __future__ import annotations

from typing import Any

import tvm

from bitlower.backends.tvm_kernels.spec.target import TARGETS, Target

ARCHITECTURE = "sm_80"
"""The least NVIDIA GPU that kernels are scheduled for."""


def tvm_target(target: Target, architecture: str = ARCHITECTURE) -> Any:
    """The TVM target, with the host's code for any processor of this kind where it is a GPU.

    A CPU target that needs features of a processor is for the one that this is run on; one that needs none is told no
    processor, so that what it makes runs on all of its kind.

    Args:
        target: whose code.
        architecture: of an NVIDIA GPU.
    """
    form: dict[str, Any] = {"kind": target.kind, **dict(target.options)}
    if target.on_cpu:
        return tvm.target.Target(form | ({"mcpu": _processor()} if target.features else {}))
    return tvm.target.Target(form | ({"arch": architecture} if target.kind == "cuda" else {}), host={"kind": "llvm"})


def host_target() -> Target:
    """The best target that this processor can run: the one that needs most of its features."""
    return max(filter(runs_here, TARGETS.values()), key=lambda target: len(target.features))


def runs_here(target: Target) -> bool:
    """Whether this processor runs code for a CPU target; false for GPUs."""
    host = tvm.target.Target({"kind": "llvm", "mcpu": _processor()})
    return target.on_cpu and all(tvm.target.codegen.target_has_features(name, host) for name in target.features)


def _processor() -> str:
    return str(tvm.target.codegen.llvm_get_system_cpu())
