"""Attention in Relax: ``fused_attention``, and the operator that no quantizer touches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from tvm import relax

from bitlower.backends.tvm_kernels.relax.builder import Frame, constant, dtype_name
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.relax.views import heads_of, joins_heads, swaps_heads
from bitlower.backends.tvm_kernels.schedules.dispatch import lower_attention
from bitlower.backends.tvm_kernels.spec.attention import OPERANDS, Attention
from bitlower.backends.tvm_kernels.spec.operators import NO_QUANTIZER
from bitlower.backends.tvm_kernels.tir.attention import result_shape
from bitlower.ir import Grid, TensorType
from bitlower.ir.operators import AttentionNode
from bitlower.ir.types import Dim


def convert_attention(call: Call) -> list[Any]:
    """The results of a ``fused_attention``."""
    frame, arguments = call.frame, call.arguments
    what = _attention(
        frame,
        arguments,
        factor=float(arguments["factor"]),
        causal=bool(arguments.get("causal")),
        joined=bool(arguments.get("heads")),
        scored=_grid(arguments.get("scores_grid")),
        probs=_grid(arguments.get("probs_grid")),
    )
    inputs = _inputs(frame, what, arguments)
    for name in (*OPERANDS, "scores", "probs"):
        if arguments.get(f"{name}_scale") is not None:
            inputs += [constant(part.reshape(1)) for part in call.static(name)]
    out = call.static("out") if call.has_codes and "value" not in call.names else None
    columns = what.value_head_dim * (what.heads if what.joined else 1)
    if out is None or out[0].size not in (1, columns):
        what = replace(what, result="float32" if call.has_codes else call.dtype)
        return call.finished(_emit(frame, what, arguments, inputs))
    what = replace(what, output=_grid(arguments["out_grid"]), scales=out[0].size)
    inputs += [constant(part.reshape(-1)) for part in out]
    return call.results({"codes": _emit(frame, what, arguments, inputs)}, 0)


def convert_float_attention(frame: Frame, node: fx.Node) -> Any:
    """``scaled_dot_product_attention`` between floats."""
    view = AttentionNode(node)
    arguments: dict[str, Any] = {"query": view.query, "key": view.key, "value": view.value, "mask": view.mask}
    assert view.scale is not None, f"%{node.name} has heads of a symbolic width"
    joined = bool(node.users) and all(swaps_heads(user) or joins_heads(user) for user in node.users)
    what = _attention(frame, arguments, factor=view.scale, causal=view.is_causal, joined=joined)
    what = replace(what, result=dtype_name(frame.kind_of(node)))
    frame.log.refuse(node, NO_QUANTIZER)
    context = _emit(frame, what, arguments, _inputs(frame, what, arguments))
    if joined:
        frame.joined[node] = context  # all that is read of it
    return context


def _attention(frame: Frame, arguments: dict[str, Any], **options: Any) -> Attention:
    query, key, value = (_type(arguments[name]) for name in OPERANDS)
    mask = arguments.get("mask")
    strips = [heads_of(frame, arguments[name]) for name in OPERANDS]
    sizes = (1,) * (4 - _type(mask).rank) + _type(mask).shape if mask is not None else ()
    return Attention(
        heads=_number(query.shape[1]),
        kv_heads=_number(key.shape[1]),
        head_dim=_number(query.shape[3]),
        value_head_dim=_number(value.shape[3]),
        query=dtype_name(frame.kind_of(arguments["query"])),
        key=dtype_name(frame.kind_of(arguments["key"])),
        value=dtype_name(frame.kind_of(arguments["value"])),
        mask=dtype_name(_type(mask)) if mask is not None else "",
        mask_broadcast=tuple(size == 1 for size in sizes),
        places=tuple((strip.columns, strip.start) if strip else None for strip in strips),
        **options,
    )


def _inputs(frame: Frame, what: Attention, arguments: dict[str, Any]) -> list[Any]:
    """Query, key, value, and the mask with four axes."""
    strips = [heads_of(frame, arguments[name]) for name in OPERANDS]
    values = [
        strip.value if strip else frame.value(arguments[name]) for name, strip in zip(OPERANDS, strips, strict=True)
    ]
    if what.mask:
        kind = _type(arguments["mask"])
        shape = [frame.dim(1)] * (4 - kind.rank) + frame.shape(kind)
        mask = frame.value(arguments["mask"])
        values.append(mask if kind.rank == 4 else frame.reshape(mask, shape))
    return values


def _emit(frame: Frame, what: Attention, arguments: dict[str, Any], inputs: list[Any]) -> Any:
    """Call the function of ``what``."""
    batch, _, queries, _ = frame.shape(_type(arguments["query"]))
    kind = relax.TensorType(result_shape(what, batch, queries), what.result_dtype)
    return frame.emit(
        relax.call_tir(frame.kernel(what, what.name, lambda: lower_attention(what, frame.target)), inputs, out_ty=kind)
    )


def _grid(text: str | None) -> Grid | None:
    return Grid.parse(text) if text else None


def _type(node: fx.Node) -> TensorType:
    kind: TensorType = node.meta["type"]
    return kind


def _number(size: Dim) -> int:
    assert isinstance(size, int), f"attention over the symbolic dimension {size}"
    return size
