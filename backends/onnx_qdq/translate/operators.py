"""Translations of our own: the low-bit operators, and ATen operators that torch has none for or a worse one.

Quantizers become operators of the domain ``bitlower`` (``Quantize``, ``Dequantize``, ``ChooseQparams``) that no
optimizer looks into, and linears become ``MatMul(x, Transpose(weight)) + bias``. Arguments are those of the operator in
torch; dtypes come as ONNX's, other things of torch as text.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import BOOL, FLOAT, INT8, opset18

from bitlower.backends.onnx_qdq.graph.nodes import DOMAIN
from bitlower.backends.onnx_qdq.translate import attention
from bitlower.ir import ops

aten = torch.ops.aten
_ANY = ["tensor(float)", "tensor(uint8)", "tensor(int8)", "tensor(uint16)", "tensor(int16)"]


@functools.cache
def translations(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """By operator; all go before torch's."""
    return {
        ops.quantize: _quantize,
        ops.dequantize: _dequantize,
        ops.choose_qparams: _choose_qparams,
        operator.getitem: _getitem,
        aten.linear.default: _linear,
        aten.addmm.default: _addmm,
        aten.rsub.Scalar: _rsub,
        aten.squeeze.dims: _squeeze,
        aten.to.dtype: _to,
        aten.to.device: _to_device,
        aten.to.dtype_layout: _to_layout,
        aten.__and__.Tensor: _and,
        aten.__or__.Tensor: _or,
        aten.min.other: opset18.Min,
        aten.max.other: opset18.Max,
        aten.scaled_dot_product_attention.default: attention.for_opset(opset),
        aten._safe_softmax.default: attention.safe_softmax,
    }


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
    made: Callable[..., Any] = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)
    return made


_INT, _STRING = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.STRING
_QUANTIZE = _operator(
    "Quantize", ("x", "scale", "zero_point"), 1, quant_min=_INT, quant_max=_INT, dtype=_STRING, name=_STRING
)
_DEQUANTIZE = _operator("Dequantize", ("code", "scale", "zero_point"), 1)
_CHOOSE = _operator(
    "ChooseQparams", ("x",), 2, bits=_INT, signed=_INT, symmetric=_INT, restricted=_INT, convention=_STRING
)


def _quantize(x: FLOAT, scale: FLOAT, zero_point: FLOAT, quant_min: int, quant_max: int, dtype: str, name: str) -> INT8:
    """``name`` is that of the node in the Program."""
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


def _getitem(results: Any, index: int) -> Any:
    """One of several results, or of a sequence of tensors."""
    return results[index] if isinstance(results, Sequence) else opset18.SequenceAt(results, _number(index))


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
    """``other - alpha * self``."""
    if alpha != 1.0:
        self = opset18.Mul(self, opset18.CastLike(_number(alpha), self))
    return opset18.Sub(opset18.CastLike(_number(other), self), self)


def _squeeze(self: FLOAT, dim: Sequence[int]) -> FLOAT:
    """Axes of another size than 1 stay."""
    axes = [axis for axis in dim if self.shape[axis] == 1]
    return opset18.Squeeze(self, opset18.Constant(value_ints=axes)) if axes else opset18.Identity(self)


def _to(self: FLOAT, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: str = "") -> FLOAT:
    return self if self.dtype == dtype else opset18.Cast(self, to=dtype)


def _to_device(self: FLOAT, device: str, dtype: int, *layout: Any, **other: Any) -> FLOAT:
    return _to(self, dtype)


def _to_layout(self: FLOAT, dtype: int | None = None, **other: Any) -> FLOAT:
    return self if dtype in (None, -1) else _to(self, dtype)


def _and(self: BOOL, other: BOOL) -> BOOL:
    return opset18.And(self, other) if self.dtype is ir.DataType.BOOL else opset18.BitwiseAnd(self, other)


def _or(self: BOOL, other: BOOL) -> BOOL:
    return opset18.Or(self, other) if self.dtype is ir.DataType.BOOL else opset18.BitwiseOr(self, other)


def _number(value: float) -> Any:
    return opset18.Constant(value_int=value) if isinstance(value, int) else opset18.Constant(value_float=value)
