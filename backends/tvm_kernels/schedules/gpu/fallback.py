"""Schedules of the functions that have none of their own: all loops that can run at once are shared out to threads.

These are expressions between the kernels (masks, rotary tables, casts, slices): one element a thread, neighbours in
neighbouring threads, and sums in a loop of each thread.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import dlight

from bitlower.ir import CheckError


def schedule(module: Any, target: Any) -> Any:
    """Give every function of a module that has no schedule one by TVM's fallback rule.

    Args:
        module: whose functions are fused.
        target: of :func:`~bitlower.backends.tvm_kernels.target.tvm_target`.

    Raises:
        CheckError: a function is not bound to threads.
    """
    changed = {}
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            own = "bitlower.family" in (function.attrs or {})
            changed[name] = function if own else _scheduled(function, target)
            if not launches(changed[name]):
                raise CheckError(f"the function {name.name_hint} of the library has no schedule for {target.kind.name}")
    module = module.clone()
    module.update(tvm.IRModule(changed))
    return module


def _scheduled(function: Any, target: Any) -> Any:
    with target:
        result = dlight.gpu.Fallback().apply(function, target, False)
    return function if result is None else result.mod["main"].with_attrs(dict(function.attrs))


def launches(function: Any) -> int:
    """How many device functions one call of a scheduled function starts; those it chooses between count once."""
    return _launches(function.body)


def _launches(part: Any) -> int:
    if isinstance(part, tirx.AttrStmt) and part.attr_key == "thread_extent":
        return 1
    if isinstance(part, tirx.For) and part.kind == tirx.ForKind.THREAD_BINDING:
        return 1
    if isinstance(part, tirx.SeqStmt):
        return sum(map(_launches, part.seq))
    if isinstance(part, tirx.IfThenElse):
        return max(map(_launches, filter(None, (part.then_case, part.else_case))))
    inner = getattr(part, "block", None) or getattr(part, "body", None)
    return 0 if inner is None else _launches(inner)
