"""What a library starts on a GPU when it is called once: device functions, and the bytes that they read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, sym

from bitlower.backends.tvm_kernels.relax.precision import AUTO
from bitlower.backends.tvm_kernels.relax.program import fuse_module
from bitlower.backends.tvm_kernels.schedules.gpu.fallback import launches
from bitlower.backends.tvm_kernels.spec.functions import functions_of
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import Program


@dataclass(frozen=True)
class Launch:
    """A call of a function.

    Args:
        name: of the function.
        count: device functions that it starts.
        read: bytes of all that it is given, each tensor once.
        written: bytes of all that it returns.
    """

    name: str
    count: int
    read: int
    written: int


def launches_of(
    program: Program, sizes: Mapping[str, int], target: Target = Target.CUDA, activations: str = AUTO
) -> list[Launch]:
    """The calls of functions in the library of a fused program, in order.

    Args:
        program: at level fused.
        sizes: the symbolic dimensions by name.
        target: a GPU.
        activations: as :func:`~bitlower.backends.tvm_kernels.library.compile.compile_program` takes them.
    """
    module = fuse_module(program, target, tvm_target(target), activations=activations)
    calls = [
        binding.value
        for name in functions_of(program)
        for block in module[name].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call) and binding.value.op == tvm.ir.Op.get("relax.call_tir")
    ]
    return [_launch(module, call, sizes) for call in calls]


def _launch(module: Any, call: Any, sizes: Mapping[str, int]) -> Launch:
    function, operands, *_ = call.args
    read = sum(_bytes(argument.ty, sizes) for argument in set(operands))
    return Launch(function.name_hint, launches(module[function]), read, _bytes(call.ty, sizes))


def _bytes(kind: Any, sizes: Mapping[str, int]) -> int:
    """The size of a tensor, or of all tensors of a tuple; a number is none."""
    if isinstance(kind, relax.TupleType):
        return sum(_bytes(field, sizes) for field in kind.fields)
    if not isinstance(kind, relax.TensorType):
        return 0
    entries = 1
    analyzer = sym.Analyzer()
    for variable in relax.analysis.tir_vars_in_type(kind):
        analyzer.bind(variable, i64(sizes[variable.name]))
    for size in kind.shape:
        entries *= int(analyzer.simplify(size))
    return entries * np.dtype(str(kind.dtype)).itemsize
