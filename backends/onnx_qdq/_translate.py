"""From a Program to an ONNX graph in which the low-bit operators still stand as themselves.

The Program is traced again by ``torch.export`` and translated by ``torch.onnx``; quantizers become operators of the
domain ``bitlower`` (``Quantize``, ``Dequantize``, ``ChooseQparams``) that no optimizer looks into, and linears become
``MatMul(x, Transpose(weight)) + bias``. The rewrites then choose a standard form for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common
from onnxscript import FLOAT, INT8, opset18

from bitlower.backends.onnx_qdq import _translate_attention
from bitlower.backends.onnx_qdq._trace import explain, named_quantize, put_back, quiet, trace
from bitlower.ir import BitlowerError, Program, ops

DOMAIN = "bitlower"
aten = torch.ops.aten
_ANY = ["tensor(float)", "tensor(uint8)", "tensor(int8)", "tensor(uint16)", "tensor(int16)"]


def translate(program: Program, opset: int) -> ir.Model:
    """The model of the graph ``model`` with inputs, outputs and dimensions named as the Program names them.

    Raises:
        BitlowerError: an operator has no translation, or a dynamic dimension turned out fixed.
    """
    traced = trace(program)
    with quiet(), explain(program, "translated to ONNX"):
        result = torch.onnx.export(
            traced.exported,
            (),
            dynamo=True,
            opset_version=opset,
            custom_translation_table=_translations(opset),
            optimize=True,
            verbose=False,
        )
    assert result is not None
    model: ir.Model = result.model
    put_back(model.graph, program, traced)
    common.CommonSubexpressionEliminationPass()(model)
    _name_interface(model, program)
    return model


def _name_interface(model: ir.Model, program: Program) -> None:
    """Name inputs and outputs as the Program does, with its symbolic dimensions; no other value keeps such a name."""
    graph = model.graph
    _compute_constant_outputs(graph)
    wanted = {spec.name for spec in (*program.inputs, *program.outputs)}
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in wanted:
            value.name = f"{value.name}_value"
    for kind, values, specs in (("input", graph.inputs, program.inputs), ("output", graph.outputs, program.outputs)):
        if len(values) != len(specs):
            raise BitlowerError(f"the ONNX graph has {len(values)} {kind}s, the program {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(list(spec.type.shape))


def _compute_constant_outputs(graph: ir.Graph) -> None:
    """Let a node give each output that is a stored tensor: only what a node gives can have the Program's name."""
    for place, value in enumerate(graph.outputs):
        if value.name in graph.initializers:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _operator(name: str, inputs: Sequence[str], outputs: int, /, **attributes: Any) -> Callable[..., Any]:
    """An operator of our own domain, as onnxscript calls it."""
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter(i, f"T_{i}") for i in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter(f"y{i}", f"T_y{i}") for i in range(outputs)],
        type_constraints=[(f"T_{i}", _ANY, "") for i in (*inputs, *(f"y{k}" for k in range(outputs)))],
        attributes=[onnx.defs.OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
    )
    operator: Callable[..., Any] = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)
    return operator


_INT, _STRING = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.STRING
_QUANTIZE = _operator(
    "Quantize", ("x", "scale", "zero_point"), 1, quant_min=_INT, quant_max=_INT, dtype=_STRING, name=_STRING
)
_DEQUANTIZE = _operator("Dequantize", ("code", "scale", "zero_point"), 1)
_CHOOSE = _operator(
    "ChooseQparams", ("x",), 2, bits=_INT, signed=_INT, symmetric=_INT, restricted=_INT, convention=_STRING
)


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    return {
        named_quantize: _quantize,
        ops.dequantize: _dequantize,
        ops.choose_qparams: _choose_qparams,
        aten.linear.default: _linear,
        aten.addmm.default: _addmm,
        aten.rsub.Scalar: _rsub,
        aten.scaled_dot_product_attention.default: _translate_attention.for_opset(opset),
        aten._safe_softmax.default: _translate_attention.safe_softmax,
    }


def _quantize(x: FLOAT, scale: FLOAT, zero_point: FLOAT, quant_min: int, quant_max: int, dtype: str, name: str) -> INT8:
    return _QUANTIZE(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype, name=name)


def _dequantize(code: INT8, scale: FLOAT, zero_point: FLOAT) -> FLOAT:
    return _DEQUANTIZE(code, scale, zero_point)


def _choose_qparams(x: FLOAT, bits: int, signed: bool, symmetric: bool, restricted: bool, convention: str) -> Any:
    return _CHOOSE(
        x,
        bits=bits,
        signed=int(signed),
        symmetric=int(symmetric),
        restricted=int(restricted),
        convention=convention,
    )


def _linear(input: FLOAT, weight: FLOAT, bias: FLOAT | None = None) -> FLOAT:
    """Never Gemm: onnxruntime runs a quantized Gemm with a float bias in float."""
    product = opset18.MatMul(input, opset18.Transpose(weight, perm=[1, 0]))
    return product if bias is None else opset18.Add(product, bias)


def _addmm(input: FLOAT, mat1: FLOAT, mat2: FLOAT, beta: float = 1.0, alpha: float = 1.0) -> FLOAT:
    product = opset18.MatMul(mat1, mat2)
    if alpha != 1.0:
        product = opset18.Mul(product, opset18.CastLike(opset18.Constant(value_float=alpha), product))
    if beta != 1.0:
        input = opset18.Mul(input, opset18.CastLike(opset18.Constant(value_float=beta), input))
    return opset18.Add(product, input)


def _rsub(self: FLOAT, other: float, alpha: float = 1.0) -> FLOAT:
    """``other - alpha * self``; torch's own way through ``sub`` fails where whole numbers meet a float (XLNet)."""
    if isinstance(other, float) and not self.dtype.is_floating_point():
        self = opset18.Cast(self, to=ir.DataType.FLOAT)
    if alpha != 1.0:
        self = opset18.Mul(self, opset18.CastLike(_number(alpha), self))
    return opset18.Sub(opset18.CastLike(_number(other), self), self)


def _number(value: float) -> Any:
    return opset18.Constant(value_int=value) if isinstance(value, int) else opset18.Constant(value_float=value)
