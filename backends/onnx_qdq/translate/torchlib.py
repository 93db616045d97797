"""torch.onnx's own translations of ATen operators, taken one at a time, and the recorder that they write nodes with.

``torch.onnx.export`` traces, decomposes and optimizes around them, which costs most of its time; a Program has been
traced, and the rewrites of this backend optimize it. All that is private in torch and used here is named in this file.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch.onnx._internal.exporter._building import OpRecorder
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET as TORCH_OPSET
from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype as onnx_dtype
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.exporter._tensors import SymbolicTensor

__all__ = ["TORCH_OPSET", "Recorded", "onnx_dtype", "record", "translation", "value"]
Translation = Callable[..., Any]


@dataclass(frozen=True)
class Recorded:
    """What a translation wrote: its result, the nodes in order, and functions that they call."""

    result: Any
    nodes: Sequence[ir.Node]
    functions: Mapping[Any, ir.Function]


def translation(target: Any, opset: int, *, complex_operands: bool = False) -> Translation | None:
    """Torch's translation of an operator at ``opset``; None if it has none."""
    decompositions = _registry(opset).get_decomps(target)
    return next((entry.onnx_function for entry in decompositions if entry.is_complex == complex_operands), None)


def record(
    function: Translation, args: Sequence[Any], kwargs: Mapping[str, Any], opset: int, constants: dict[Any, ir.Value]
) -> Recorded:
    """Call a translation, and keep what it writes; numbers become ``constants``, which all calls share."""
    recorder = OpRecorder(_opset(opset), constants)
    with onnxscript.evaluator.default_as(recorder):
        result = function(*args, **kwargs)
    return Recorded(result, recorder.nodes, {key: _function(f) for key, f in recorder.functions.items()})


def value(name: str, dtype: torch.dtype, shape: Sequence[int | str], opset: int) -> ir.Value:
    """An input or a stored tensor, as translations take it."""
    made: ir.Value = SymbolicTensor(
        _opset(opset), name=name, type=ir.TensorType(onnx_dtype(dtype)), shape=ir.Shape(list(shape))
    )
    return made


@functools.cache
def _registry(opset: int) -> ONNXRegistry:
    with _unparsed():
        return ONNXRegistry.from_torchlib(opset)


@contextmanager
def _unparsed() -> Iterator[None]:
    """Make torch's table without parsing the hundreds of functions in it: the recorder does that where it calls one."""
    importlib.import_module("torch.onnx._internal.exporter._torchlib.ops")  # torch's own entries stay as they are
    table: Any = importlib.import_module(ONNXRegistry.__module__)
    before = table.OnnxDecompMeta, table.onnxscript_apis
    table.OnnxDecompMeta = functools.partial(before[0], skip_signature_inference=True)
    table.onnxscript_apis = SimpleNamespace(get_torchlib_ops=_functions)
    try:
        yield
    finally:
        table.OnnxDecompMeta, table.onnxscript_apis = before


def _functions() -> list[SimpleNamespace]:
    """What ``onnxscript`` lists for torch: by operator its functions, those for complex operands last."""
    importlib.import_module("onnxscript.function_libs.torch_lib.ops")
    return [
        SimpleNamespace(qualified_name=name, function=function, is_complex=is_complex)
        for name, overloads in default_registry.items()
        if not name.startswith("internal::")
        for functions, is_complex in ((overloads.overloads, False), (overloads.complex, True))
        for function in functions
    ]


@functools.cache
def _opset(version: int) -> Any:
    return onnxscript.values.Opset("", version)


def _function(function: Any) -> ir.Function:
    """A function of torch's library as the model keeps it until it is inlined."""
    made: ir.Function = function if isinstance(function, ir.Function) else ir.from_proto(function.to_function_proto())
    return made
