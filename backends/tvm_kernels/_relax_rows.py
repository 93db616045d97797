"""Norms, pointwise kernels, embeddings and rotary embeddings in Relax."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from bitlower.backends.tvm_kernels._build_linear import dequantized as entry
from bitlower.backends.tvm_kernels._expressions import codes, decoded
from bitlower.backends.tvm_kernels._frame import i64
from bitlower.backends.tvm_kernels._packing import pack_linear
from bitlower.backends.tvm_kernels._relax_frame import Frame, constant, product
from bitlower.backends.tvm_kernels._relax_linear import activated
from bitlower.backends.tvm_kernels._relax_operands import Call
from bitlower.backends.tvm_kernels._relax_quantize import spread
from bitlower.backends.tvm_kernels._relax_views import strip_of
from bitlower.backends.tvm_kernels._spec import ActivationSpec, EmbeddingSpec, LinearSpec, NormSpec
from bitlower.ir import BitlowerError, Grid, TensorType
from bitlower.ir.operators import EmbeddingNode

_EPSILON = float(np.finfo(np.float32).eps)


def convert_norm(call: Call) -> list[Any]:
    """The results of a ``fused_norm``."""
    columns = _columns(call.type_of("x"))
    rows = product(call.frame.shape(call.type_of("x"))[:-1])
    fixed = {"columns": columns, "kind": call.given["norm"], "epsilon": _epsilon(call.given["eps"])}
    fixed |= {"target": call.frame.target, "bias": call.given.get("bias") is not None}
    residual = call.given.get("residual") is not None
    given: dict[str, Any] = {"weight": _weight(call, columns)}
    if call.given.get("bias") is not None:
        given["bias"] = call.frame.value(call.given["bias"])
    try:
        spec = NormSpec(
            **fixed,
            x_codes=call.quantizer("x"),
            residual=residual,
            residual_codes=call.quantizer("residual"),
            output=call.quantizer("out"),
            keep=call.keep if call.has_codes else "",
            keep_sum="sum" in call.names,
        )
    except BitlowerError:
        total = call.add(call.real("x"), "residual")
        plain = given | {"x": call.frame.rows(total, call.type_of("x"))}
        found = call.frame.call(NormSpec(**fixed), plain, rows)["values"]
        return call.finished(call.frame.reshape(found, call.frame.shape(call.type_of("x"))), total=total)
    call.operand("x", "x", given)
    if residual:
        call.operand("residual", "residual", given)
    if spec.output is not None:
        call.out_scales(spec.output, columns, given)
    return call.kernel(spec, given, rows)


def _weight(call: Call, columns: int) -> Any:
    """The weight of a norm in float32; stored codes are dequantized now."""
    if call.given.get("weight") is None:
        return constant(np.ones(columns, np.float32))
    stored = call.floats("weight")
    return call.real("weight") if stored is None else constant(stored)


def convert_float_norm(
    frame: Frame, kind: TensorType, norm: str, x: Any, weight: Any, bias: Any, eps: Any, values: str = "float32"
) -> Any:
    """A LayerNorm or RMSNorm over the last axis that no quantizer touches; its result is of the dtype ``values``."""
    spec = NormSpec(
        target=frame.target, columns=_columns(kind), kind=norm, epsilon=_epsilon(eps), bias=bias is not None
    )
    ones = constant(np.ones(spec.columns, np.float32))
    given = {"x": frame.rows(x, kind), "weight": ones if weight is None else weight, "bias": bias}
    found = frame.call(spec, given, product(frame.shape(kind)[:-1]), values)
    return frame.reshape(found["values"], frame.shape(kind))


def convert_pointwise(call: Call) -> list[Any]:
    """The results of a ``fused_pointwise``."""
    frame, kind = call.frame, call.type_of("x")
    operands = [name for name in ("x", "factor", "residual") if call.given.get(name) is not None]
    halves = _halves(call)
    columns = _columns(kind) * (_count(kind.shape[1]) if call.given.get("heads") else 1)
    try:
        spec = ActivationSpec(
            target=frame.target,
            columns=columns,
            function=call.given.get("activation", ""),
            x_codes=call.quantizer("x"),
            gate="halves" if halves is not None else "separate" if "factor" in operands else "",
            gate_codes=call.quantizer("factor"),
            residual="residual" in operands,
            residual_codes=call.quantizer("residual"),
            output=call.quantizer("out"),
            keep=call.keep if call.has_codes else "",
        )
        if call.given.get("heads") and any(_has_rows(call, name) for name in operands):
            raise BitlowerError(f"%{call.node.name}: operands with heads have one scale")
    except BitlowerError:
        return _plain_pointwise(call)
    given: dict[str, Any] = {}
    if halves is not None:
        given["x"] = frame.reshape(halves, [product(frame.shape(kind)[:-1]), frame.dim(2 * columns)])
        operands = [name for name in operands if name == "residual"]
    for name, argument in zip(operands, [{"factor": "gate"}.get(name, name) for name in operands], strict=True):
        call.operand(name, argument, given)
        if call.given.get("heads"):
            value = joined(call, name, frame.value(call.given[name]))
            given[argument] = frame.reshape(value, [_tokens(frame, kind), columns])
    if spec.output is not None:
        call.out_scales(spec.output, columns, given)
    heads = call.given.get("heads")
    return call.kernel(spec, given, _tokens(frame, kind) if heads else product(frame.shape(kind)[:-1]))


def _halves(call: Call) -> Any:
    """The rows whose first half is ``x`` and whose second half is the factor; None if there are none."""
    if call.given.get("factor") is None or call.quantizer("x") or call.quantizer("factor") or call.given.get("heads"):
        return None
    first, second = (strip_of(call.frame, call.given[name]) for name in ("x", "factor"))
    if first is None or second is None or first.value is not second.value:
        return None
    size = first.columns // 2
    return first.value if (first.start, second.start, size) == (0, size, _columns(call.type_of("x"))) else None


def _has_rows(call: Call, name: str) -> bool:
    spec = call.quantizer(name)
    return spec is not None and spec.granularity.kind != "tensor"


def _plain_pointwise(call: Call) -> list[Any]:
    frame, value = call.frame, call.real("x")
    if call.given.get("activation"):
        value = activated(frame, call.given["activation"], value)
    if call.given.get("factor") is not None:
        value = frame.emit(relax.op.multiply(value, call.real("factor")))
    value = call.add(value, "residual")
    if call.given.get("heads"):
        value = joined(call, "x", value)
    return call.finished(value)


def joined(call: Call, name: str, value: Any) -> Any:
    """An operand ``[batch, heads, length, width]`` as ``[batch, length, heads · width]``, which it may be already."""
    frame, kind = call.frame, call.type_of(name)
    if call.given[name] in frame.joined:
        return value
    batch, heads, length, width = frame.shape(kind)
    return frame.reshape(frame.emit(relax.op.permute_dims(value, [0, 2, 1, 3])), [batch, length, heads * width])


def _tokens(frame: Frame, kind: TensorType) -> Any:
    batch, _, length, _ = frame.shape(kind)
    return batch * length


def convert_rotary(call: Call) -> list[Any]:
    """The results of a ``fused_rotary``."""
    half = _columns(call.type_of("x")) // 2

    def body(x: Any, cos: Any, sin: Any) -> Any:
        def real(index: Any) -> Any:
            return x[index].astype("float32")

        def value(*index: Any) -> Any:
            *outer, at = index
            first = at < i64(half)
            place = tirx.if_then_else(first, at + half, at - half)
            other = real((*outer, place))
            turned = tirx.if_then_else(first, tirx.const(0.0, "float32") - other, other)
            return real(index) * spread(cos, x.shape, index) + turned * spread(sin, x.shape, index)

        return te.compute(x.shape, value, name="rotary")

    tables = [call.frame.value(call.given[name]) for name in ("cos", "sin")]
    floats = call.quantizer("x") is None
    x = call.frame.value(call.given["x"]) if floats else call.real("x")
    return call.finished(call.frame.te(body, x, *tables, name="rotary"))


def convert_embedding(call: Call) -> list[Any]:
    """The results of a ``fused_embedding``: one kernel over all tables."""
    frame = call.frame
    shape = _ids_shape(call)
    specs, arrays, ids = list[LinearSpec](), list[Any](), list[Any]()
    for at, table in enumerate(call.given["tables"]):
        codes, scale, zero = (
            frame.tensor(node) for node in (table, call.given["table_scales"][at], call.given["table_zero_points"][at])
        )
        quantizer = call.node.meta["quantizers"][f"table_{at}"].spec
        spec = EmbeddingSpec(entries=codes.shape[0], columns=codes.shape[1], weight=quantizer).table()
        packed = pack_linear(spec, codes, scale, zero)
        specs.append(spec)
        arrays.append({name: constant(array) for name, array in packed.items()})
        place = frame.value(call.given["ids"][at])
        ids.append(frame.emit(relax.op.broadcast_to(place, relax.ShapeExpr(shape))))
    rounded = [
        [float(frame.tensor(node)) for node in pair]
        for pair in zip(call.given["rounded_scales"], call.given["rounded_zero_points"], strict=True)
    ]
    body = _embedding_body(specs, [list(array) for array in arrays], rounded, call.given.get("rounded_grid", ""))
    flat = [value for array in arrays for value in array.values()]
    return call.finished(frame.te(body, *ids, *flat, name="embedding"))


def _embedding_body(specs: list[LinearSpec], names: list[list[str]], rounded: list[list[float]], grid: str) -> Any:
    """The sum of entries of tables; the arguments are the ids of all tables, then the arrays of each."""

    def body(*given: Any) -> Any:
        ids, rest = given[: len(specs)], iter(given[len(specs) :])
        tables = [{name: next(rest) for name in held} for held in names]
        shape = (*ids[0].shape, i64(specs[0].inputs))

        def value(*index: Any) -> Any:
            *token, column = index
            total = None
            for at, (spec, table) in enumerate(zip(specs, tables, strict=True)):
                term = entry(spec, table, _row(ids[at][tuple(token)], spec.outputs), column)
                total = term if total is None else total + term
                if 0 < at <= len(rounded):
                    scale, zero = (tirx.const(part, "float32") for part in rounded[at - 1])
                    total = decoded(codes(total, scale, zero, Grid.parse(grid)), scale, zero)
            return total

        return te.compute(shape, value, name="embedding")

    return body


def convert_float_embedding(frame: Frame, node: fx.Node) -> Any:
    """Rows of a table of floats, which is stored as the weights of float linears are."""
    source, ids = EmbeddingNode(node).table, frame.value(EmbeddingNode(node).ids)
    stored = source.op == "get_attr"
    table = constant(frame.tensor(source).astype(frame.dtype)) if stored else frame.value(source)
    rows = _count(source.meta["type"].shape[0])

    def body(table: Any, ids: Any) -> Any:
        shape = (*ids.shape, table.shape[1])

        def value(*index: Any) -> Any:
            return table[_row(ids[index[:-1]], rows), index[-1]].astype("float32")

        return te.compute(shape, value, name="embedding")

    return frame.te(body, table, ids, name="embedding")


def _row(index: Any, rows: int) -> Any:
    """The row of a table: the nearest one that there is, since other memory must not be read."""
    return tirx.max(tirx.min(index, tirx.const(rows - 1, index.dtype)), tirx.const(0, index.dtype))


def _ids_shape(call: Call) -> list[Any]:
    """The common shape of the ids: that of the result but for the last axis."""
    from bitlower.ir import kernels

    kind = kernels.outputs(call.node)[0].type
    return call.frame.shape(kind)[:-1]


def _columns(kind: TensorType) -> int:
    return _count(kind.shape[-1])


def _count(size: int | str) -> int:
    assert isinstance(size, int), f"a dimension of a kernel is the symbolic {size}"
    return size


def _epsilon(eps: float | None) -> float:
    return _EPSILON if eps is None else eps
