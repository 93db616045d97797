"""What a model is between passes: the Program, quantization types and numerics, low-bit operators, checks and views."""

from bitlower.ir import kernels, ops
from bitlower.ir.diagnostics import BitlowerError, CheckError, describe, nearest, shorten
from bitlower.ir.fit import Batch, ValueSpec
from bitlower.ir.program import Program
from bitlower.ir.quantization import packing
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.grid import Grid, ScaleConvention
from bitlower.ir.quantization.scheme import QuantSpec, Scheme
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import copy_module, get_tensor, set_tensor
from bitlower.ir.types import Length, Level, TensorType

__all__ = [
    "Batch",
    "BitlowerError",
    "CheckError",
    "Granularity",
    "Grid",
    "Length",
    "Level",
    "Program",
    "QuantSpec",
    "Quantizer",
    "ScaleConvention",
    "Scheme",
    "TensorType",
    "ValueSpec",
    "copy_module",
    "describe",
    "get_tensor",
    "kernels",
    "nearest",
    "ops",
    "packing",
    "set_tensor",
    "shorten",
]
