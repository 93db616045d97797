"""``fused_linear`` in Relax: the kernel of its spec, or float32 products where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from bitlower.backends.tvm_kernels.relax.builder import Array, Frame, constant, dtype_name, product
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.relax.quantize import activated, dequantized, quantized
from bitlower.backends.tvm_kernels.relax.views import Strip
from bitlower.backends.tvm_kernels.schedules.gpu.linear import refusal
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.operators import NO_QUANTIZER
from bitlower.backends.tvm_kernels.spec.packing import pack_float, pack_linear, pack_vector
from bitlower.backends.tvm_kernels.tir import expressions as expressions
from bitlower.ir import Grid, TensorType, kernels

_MOST_RUNS = 64
"""Kernels have code of their own for each group of embedding dimensions, if these are not equal."""


def convert_linear(call: Call) -> list[Any]:
    """The results of a ``fused_linear``."""
    planned = plan_linear(call)
    if isinstance(planned, str):
        call.refuse(planned)
        return _plain(call)
    spec, runs = planned
    operands = _arguments(call, spec, runs)
    m = product(call.frame.shape(call.type_of("x"))[:-1])
    values = call.frame.call(spec, operands, m, call.dtype)
    sizes = call.arguments.get("merged_n")
    if not sizes:
        return call.results(values, 0)
    results, start = list[Any](), 0
    for part, size in enumerate(sizes):
        results += call.results({name: _columns(call, value, start, size) for name, value in values.items()}, part)
        start += size
    _note_strips(call, values, sizes)
    return results


def _note_strips(call: Call, values: dict[str, Any], sizes: list[int]) -> None:
    """Note where in the rows of the whole result each layer's own lies."""
    kind, columns = call.type_of("x"), sum(sizes)
    if kind.rank != 3:
        return
    shape = [*call.frame.shape(kind)[:-1], call.frame.dim(columns)]
    whole = {name: call.frame.reshape(value, shape) for name, value in values.items()}
    whole["value"] = whole["rounded"] = whole.get("values")
    for (part, name), node in kernels.read_outputs(call.node).items():
        if whole.get(name) is not None and not (name == "rounded" and call.keep != "rounded"):
            call.frame.strips[node] = Strip(whole[name], columns, sum(sizes[:part]))


def plan_linear(call: Call) -> tuple[LinearSpec, Array | None] | str:
    """The spec of the kernel, and where each group of embedding dimensions of x starts (None: x has no groups).

    Or the reason why there is no kernel.
    """
    codes, weight = call.stored("weight"), call.quantizer("weight")
    assert codes is not None, f"the weight of %{call.node.name} is not stored"
    assert weight is not None, f"the weight of %{call.node.name} has no quantizer"
    if call.arguments.get("bias") is not None and call.stored("bias") is None:
        return "kernels take a bias that is stored, and this one is computed"
    starts, splits = _runs(call, codes.shape[1])
    if len(splits) > _MOST_RUNS:
        return f"kernels take {_MOST_RUNS} unequal groups of embedding dimensions, and there are {len(splits)}"
    x_quant = call.quantizer("x")
    spec = LinearSpec.plan(
        target=call.frame.target,
        dtype=call.frame.dtype if x_quant is None else "float32",
        k=codes.shape[1],
        n=codes.shape[0],
        weight=weight,
        x_quant=x_quant,
        splits=splits,
        bias=call.arguments.get("bias") is not None,
        activation=call.arguments.get("activation", ""),
        rounded=call.quantizer("rounded"),
        residual=call.arguments.get("residual") is not None,
        residual_codes=call.quantizer("residual"),
        output=call.quantizer("out"),
        keep=call.keep if call.has_codes else "",
    )
    laid = spec if isinstance(spec, str) else laid_out(spec)
    return laid if isinstance(laid, str) else (laid, starts)


def laid_out(spec: LinearSpec) -> LinearSpec | str:
    """The linear in the layout that is best for its target, or the reason why a GPU has no kernel for it."""
    if spec.target.on_cpu:
        panels = all(size % spec.step == 0 for size in spec.segment_sizes)
        return replace(spec, layout=Layout.PANELS) if panels else spec
    return refusal(spec) or spec


def _runs(call: Call, columns: int) -> tuple[Array | None, tuple[int, ...]]:
    """Where the runs of columns of x with one scale start, and their sizes; nothing for a scale for all columns."""
    spec = call.quantizer("x")
    if spec is None or not spec.granularity.kind.startswith("embedding"):
        return None, ()
    pair = np.stack([part.reshape(-1) for part in call.static("x")])
    spaced = np.repeat(pair, columns // pair.shape[1], 1)
    starts = np.flatnonzero(np.r_[True, (spaced[:, 1:] != spaced[:, :-1]).any(0)])
    return starts, tuple(int(size) for size in np.diff([*starts, columns]))


def _arguments(call: Call, spec: LinearSpec, starts: Array | None) -> dict[str, Any]:
    """All that the kernel reads."""
    operands: dict[str, Any] = {}
    if starts is None:
        call.operand("x", "x", operands)
    else:
        operands["x"] = call.frame.rows(call.frame.value(call.arguments["x"]), call.type_of("x"))
        for name, part in zip(("x_scale", "x_zero"), call.static("x"), strict=True):
            spaced = np.repeat(part.reshape(-1), spec.k // part.size)
            operands[name] = constant(spaced[starts])
    codes = call.stored("weight")
    assert codes is not None
    packed = pack_linear(spec, codes, *call.static("weight"))
    operands |= {name: constant(array) for name, array in packed.items()}
    bias = call.stored("bias")
    if bias is not None:
        operands["bias"] = constant(pack_vector(spec, bias))
    if spec.rounded is not None:
        call.out_scales(spec.rounded, spec.n, operands, "rounded")
    if spec.residual:
        call.operand("residual", "residual", operands)
    if spec.output is not None:
        call.out_scales(spec.output, spec.n, operands)
    return operands


def _columns(call: Call, value: Any, start: int, size: int) -> Any:
    return call.frame.emit(relax.op.strided_slice(value, axes=[1], begin=[start], end=[start + size]))


def _plain(call: Call) -> list[Any]:
    """The same in float32, operator by operator, with the weight dequantized."""
    frame, weight = call.frame, call.floats("weight")
    assert weight is not None
    activation, bias = call.arguments.get("activation", ""), call.stored("bias")
    codes = call.quantizer("x") is not None
    x = call.real("x") if codes else frame.value(call.arguments["x"])
    dtype = "float32" if codes else frame.dtype
    if bias is None and call.arguments.get("bias") is not None:
        product = float_linear(frame, x, call.type_of("x"), weight, dtype=dtype)
        product = frame.emit(relax.op.add(product, frame.value(call.arguments["bias"])))
        product = activated(frame, activation, product) if activation else product
    else:
        product = float_linear(frame, x, call.type_of("x"), weight, bias, activation, dtype=dtype)
    if call.arguments.get("rounded_scale") is not None:
        scale, zero = (constant(part) for part in call.static("rounded"))
        codes = quantized(frame, product, scale, zero, Grid.parse(call.arguments["rounded_grid"]))
        product = dequantized(frame, codes, scale, zero)
    product = call.add(product, "residual")
    sizes, results, start = call.arguments.get("merged_n"), list[Any](), 0
    if not sizes:
        return call.finished(product)
    for part, size in enumerate(sizes):
        axis = call.type_of("x").rank - 1
        piece = relax.op.strided_slice(product, axes=[axis], begin=[start], end=[start + size])
        results += call.finished(frame.emit(piece), part)
        start += size
    return results


def float_linear(
    frame: Frame,
    x: Any,
    kind: TensorType,
    weight: Array,
    bias: Array | None = None,
    activation: str = "",
    *,
    dtype: str = "float32",
    values: str = "float32",
) -> Any:
    """``function(x · Wᵀ + bias)`` of floats ``x`` of a type: the kernel of its spec, or TVM's product if there is none.

    Products are of ``dtype``, and so is the weight; the result is of the dtype ``values``.
    """
    n, k = weight.shape
    spec = LinearSpec(
        target=frame.target,
        dtype=dtype,
        k=k,
        n=n,
        weight=None,
        bias=bias is not None,
        activation=activation,
    )
    laid = laid_out(spec)
    if isinstance(laid, str):
        value = frame.emit(relax.op.matmul(frame.in_dtype(x, "float32"), constant(weight.T)))
        value = value if bias is None else frame.emit(relax.op.add(value, constant(bias)))
        return frame.in_dtype(activated(frame, activation, value) if activation else value, values)
    operands = {"x": frame.rows(x, kind)} | {name: constant(array) for name, array in pack_float(laid, weight).items()}
    if bias is not None:
        operands["bias"] = constant(pack_vector(laid, bias))
    *outer, _ = frame.shape(kind)
    return frame.reshape(frame.call(laid, operands, product(outer), values)["values"], [*outer, frame.dim(n)])


def convert_float_linear(frame: Frame, node: fx.Node) -> Any:
    """``aten.linear`` that no quantizer touches; None where its weight or bias is computed."""
    x, *parts = (part for part in node.args if isinstance(part, fx.Node))
    if any(part.op != "get_attr" for part in parts):
        return None
    weight, *bias = map(frame.tensor, parts)
    frame.log.refuse(node, NO_QUANTIZER)
    dtypes = {"dtype": frame.dtype, "values": dtype_name(frame.kind_of(node))}
    return float_linear(frame, frame.value(x), x.meta["type"], weight, bias[0] if bias else None, **dtypes)
