"""Norms, pointwise kernels, embeddings and rotary embeddings in Relax."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from bitlower.backends.tvm_kernels.relax.builder import Frame, columns_of, constant, known, product
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.relax.quantize import activated
from bitlower.backends.tvm_kernels.relax.views import strip_of
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.ir import TensorType

_EPSILON = float(np.finfo(np.float32).eps)


def convert_norm(call: Call) -> list[Any]:
    """The results of a ``fused_norm``."""
    columns = columns_of(call.type_of("x"))
    m = product(call.frame.shape(call.type_of("x"))[:-1])
    fixed = {"columns": columns, "kind": call.arguments["norm"], "epsilon": _epsilon(call.arguments["eps"])}
    fixed |= {"target": call.frame.target, "bias": call.arguments.get("bias") is not None}
    residual = call.arguments.get("residual") is not None
    operands: dict[str, Any] = {"weight": _weight(call, columns)}
    if call.arguments.get("bias") is not None:
        operands["bias"] = call.frame.value(call.arguments["bias"])
    spec = NormSpec.plan(
        **fixed,
        x_codes=call.quantizer("x"),
        residual=residual,
        residual_codes=call.quantizer("residual"),
        output=call.quantizer("out"),
        keep=call.keep if call.has_codes else "",
        keep_sum="sum" in call.names,
    )
    if isinstance(spec, str):
        call.refuse(spec)
        total = call.add(call.real("x"), "residual")
        plain = operands | {"x": call.frame.rows(total, call.type_of("x"))}
        result = call.frame.call(NormSpec(**fixed), plain, m)["values"]
        return call.finished(call.frame.reshape(result, call.frame.shape(call.type_of("x"))), total=total)
    call.operand("x", "x", operands)
    if residual:
        call.operand("residual", "residual", operands)
    if spec.output is not None:
        call.out_scales(spec.output, columns, operands)
    return call.kernel(spec, operands, m)


def _weight(call: Call, columns: int) -> Any:
    """The weight of a norm in float32; stored codes are dequantized now."""
    if call.arguments.get("weight") is None:
        return constant(np.ones(columns, np.float32))
    stored = call.floats("weight")
    return call.real("weight") if stored is None else constant(stored)


def convert_float_norm(
    frame: Frame, kind: TensorType, norm: str, x: Any, weight: Any, bias: Any, eps: Any, values: str = "float32"
) -> Any:
    """A LayerNorm or RMSNorm over the last axis that no quantizer touches; its result is of the dtype ``values``."""
    spec = NormSpec(
        target=frame.target, columns=columns_of(kind), kind=norm, epsilon=_epsilon(eps), bias=bias is not None
    )
    ones = constant(np.ones(spec.columns, np.float32))
    operands = {"x": frame.rows(x, kind), "weight": ones if weight is None else weight, "bias": bias}
    results = frame.call(spec, operands, product(frame.shape(kind)[:-1]), values)
    return frame.reshape(results["values"], frame.shape(kind))


def convert_pointwise(call: Call) -> list[Any]:
    """The results of a ``fused_pointwise``."""
    frame, kind = call.frame, call.type_of("x")
    names = [name for name in ("x", "factor", "residual") if call.arguments.get(name) is not None]
    halves = _halves(call)
    columns = columns_of(kind) * (known(kind.shape[1]) if call.arguments.get("heads") else 1)
    spec = ActivationSpec.plan(
        target=frame.target,
        columns=columns,
        activation=call.arguments.get("activation", ""),
        x_codes=call.quantizer("x"),
        gate="halves" if halves is not None else "separate" if "factor" in names else "",
        gate_codes=call.quantizer("factor"),
        residual="residual" in names,
        residual_codes=call.quantizer("residual"),
        output=call.quantizer("out"),
        keep=call.keep if call.has_codes else "",
    )
    if call.arguments.get("heads") and any(_has_rows(call, name) for name in names):
        spec = "operands with heads have one scale"
    if isinstance(spec, str):
        call.refuse(spec)
        return _plain_pointwise(call)
    operands: dict[str, Any] = {}
    if halves is not None:
        operands["x"] = frame.reshape(halves, [product(frame.shape(kind)[:-1]), frame.dim(2 * columns)])
        names = [name for name in names if name == "residual"]
    for name, argument in zip(names, [{"factor": "gate"}.get(name, name) for name in names], strict=True):
        call.operand(name, argument, operands)
        if call.arguments.get("heads"):
            value = joined(call, name, frame.value(call.arguments[name]))
            operands[argument] = frame.reshape(value, [_tokens(frame, kind), columns])
    if spec.output is not None:
        call.out_scales(spec.output, columns, operands)
    heads = call.arguments.get("heads")
    return call.kernel(spec, operands, _tokens(frame, kind) if heads else product(frame.shape(kind)[:-1]))


def _halves(call: Call) -> Any:
    """The rows whose first half is ``x`` and whose second half is the factor; None if there are none."""
    if (
        call.arguments.get("factor") is None
        or call.quantizer("x")
        or call.quantizer("factor")
        or call.arguments.get("heads")
    ):
        return None
    first, second = (strip_of(call.frame, call.arguments[name]) for name in ("x", "factor"))
    if first is None or second is None or first.value is not second.value:
        return None
    size = first.columns // 2
    return first.value if (first.start, second.start, size) == (0, size, columns_of(call.type_of("x"))) else None


def _has_rows(call: Call, name: str) -> bool:
    spec = call.quantizer(name)
    return spec is not None and spec.granularity.kind != "tensor"


def _plain_pointwise(call: Call) -> list[Any]:
    frame, value = call.frame, call.real("x")
    if call.arguments.get("activation"):
        value = activated(frame, call.arguments["activation"], value)
    if call.arguments.get("factor") is not None:
        value = frame.emit(relax.op.multiply(value, call.real("factor")))
    value = call.add(value, "residual")
    if call.arguments.get("heads"):
        value = joined(call, "x", value)
    return call.finished(value)


def joined(call: Call, name: str, value: Any) -> Any:
    """An operand ``[batch, heads, length, head_dim]`` as ``[batch, length, heads · head_dim]``; it may be so."""
    frame, kind = call.frame, call.type_of(name)
    if call.arguments[name] in frame.joined:
        return value
    batch, heads, length, head_dim = frame.shape(kind)
    return frame.reshape(frame.emit(relax.op.permute_dims(value, [0, 2, 1, 3])), [batch, length, heads * head_dim])


def _tokens(frame: Frame, kind: TensorType) -> Any:
    batch, _, length, _ = frame.shape(kind)
    return batch * length


def _epsilon(eps: float | None) -> float:
    return _EPSILON if eps is None else eps
