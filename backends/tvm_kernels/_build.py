"""From a spec to a PrimFunc that says what is computed, element by element, for any schedule to reorder.

The functions are made by ``te`` with int64 indices throughout, take the buffers of
:func:`~bitlower.backends.tvm_kernels._arguments.arguments` in order, and bear the spec's name and family as attributes.
Without a schedule they run on every target that TVM has, slowly.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels._arguments import arguments
from bitlower.backends.tvm_kernels._build_linear import embedding_stages, linear_stages
from bitlower.backends.tvm_kernels._build_rows import activation_stages, norm_stages
from bitlower.backends.tvm_kernels._spec import ActivationSpec, EmbeddingSpec, KernelSpec, LinearSpec, NormSpec

Tensors = dict[str, Any]


def build(spec: KernelSpec) -> Any:
    """The unscheduled PrimFunc of ``spec``."""
    rows = tirx.Var("rows", "int64")
    given: Tensors = {}
    for argument in arguments(spec):
        if not argument.written:
            shape = [rows if size is None else tirx.IntImm("int64", size) for size in argument.shape]
            given[argument.name] = te.placeholder(shape, dtype=argument.dtype, name=argument.name)
    tensors = given | _stages(spec, given, rows)
    func = te.create_prim_func([tensors[argument.name] for argument in arguments(spec)], index_dtype_override="int64")
    for key, value in attributes(spec).items():
        func = func.with_attr(key, value)
    return func


def attributes(spec: KernelSpec) -> dict[str, Any]:
    """What every function of the spec bears."""
    return {"global_symbol": spec.name, "tirx.noalias": True, "bitlower.family": spec.family}


def _stages(spec: KernelSpec, given: Tensors, rows: Any) -> Tensors:
    match spec:
        case LinearSpec():
            return linear_stages(spec, given, rows)
        case NormSpec():
            return norm_stages(spec, given, rows)
        case ActivationSpec():
            return activation_stages(spec, given, rows)
        case EmbeddingSpec():
            return embedding_stages(spec, given, rows)
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")
