"""TVM's passes over the Relax module, in order: operators become functions, functions are fused, memory is planned."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax


def pipeline() -> Any:
    """TVM's pipeline for CPUs, in which a reshape stays what it is: another view of the same memory.

    TVM makes a function of every reshape, to find it again later by its loops; kernels with schedules of their own are
    no input for that search.
    """
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.LegalizeOps({"relax.reshape": lambda _, call: call}),
            passes.AnnotateTIROpPattern(),
            passes.FoldConstant(),
            passes.FuseOps(),
            passes.FuseTIR(),
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            passes.AttachGlobalSymbol(),
        ]
    )
