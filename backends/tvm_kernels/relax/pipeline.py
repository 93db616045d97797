"""TVM's passes over the Relax module, in order: operators become functions, functions are fused, memory is planned."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from bitlower.backends.tvm_kernels.internals import sort_shape_functions
from bitlower.backends.tvm_kernels.spec.target import Target


def fusion() -> Any:
    """The first half: every call of a function is a kernel from here on, or a few of them.

    A reshape stays what it is, another view of the same memory: TVM makes a function of it, to find it again later by
    its loops, and kernels with schedules of their own are no input for that search.
    """
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.DeadCodeElimination(),
            passes.LegalizeOps({"relax.reshape": lambda _, call: call}),
            passes.AnnotateTIROpPattern(),
            passes.FoldConstant(),
            passes.FuseOps(),
            passes.FuseTIR(),
        ]
    )


def lowering(target: Target) -> Any:
    """The second half: memory is planned, and calls become code of the virtual machine."""
    passes = relax.transform
    graphs = [passes.RewriteCUDAGraph()] if target.graphs else []  # of static shapes; others stay launches
    return tvm.transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
            *graphs,
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            sort_shape_functions(),
            passes.AttachGlobalSymbol(),
        ]
    )
