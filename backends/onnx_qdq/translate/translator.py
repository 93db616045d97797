"""From a Program to an ONNX graph in which the low-bit operators still stand as themselves.

Each node of the Program is translated where it stands: by a translation of our own, or by torch's. What the
translations leave of constants, casts and shapes that cancel out is folded; the rewrites then choose a standard form
for the low-bit operators. No pass sees large tensors: they are inputs of the graph until all is done.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx

from bitlower.backends.onnx_qdq.graph.nodes import DOMAIN
from bitlower.backends.onnx_qdq.translate.operators import translations
from bitlower.backends.onnx_qdq.translate.prepare import prepared
from bitlower.backends.onnx_qdq.translate.simplify import simplify
from bitlower.backends.onnx_qdq.translate.torchlib import (
    TORCH_OPSET,
    Translation,
    onnx_dtype,
    record,
    translation,
    value,
)
from bitlower.ir import BitlowerError, Program, get_tensor, ops
from bitlower.ir.operators import argument, graph_results

LARGE = 256
"""Tensors of more entries are kept from constant folding."""
_IR_VERSION = 10


def translate(program: Program, opset: int) -> ir.Model:
    """The model of the graph ``model`` with inputs, outputs and dimensions named as the Program names them.

    Raises:
        BitlowerError: an operator has no translation.
    """
    with quiet():
        translator = _Translator(prepared(program, lambda node: _translation(node, opset) is not None), opset)
        translator.run()
        model = translator.model
        simplify(model, opset)
    translator.put_back()
    _name_interface(model, program)
    return model


def _translation(node: fx.Node, opset: int) -> Translation | None:
    complex_operands = any(
        "type" in operand.meta and operand.meta["type"].dtype.is_complex for operand in node.all_input_nodes
    )
    return translations(opset).get(node.target) or translation(node.target, opset, complex_operands=complex_operands)


@dataclass
class _Translator:
    """One translation under way.

    Args:
        program: prepared.
        opset: of ONNX's own operators.
    """

    program: Program
    opset: int
    model: ir.Model = field(init=False)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    large: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[Any, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = ir.Graph([], [], nodes=[], opset_imports={"": TORCH_OPSET, DOMAIN: 1}, name="model")
        self.model = ir.Model(graph, ir_version=_IR_VERSION)

    def run(self) -> None:
        """Translate all nodes.

        Raises:
            BitlowerError: one has no translation.
        """
        for node in self.program.graph.nodes:
            getattr(self, node.op)(node)
        self.model.graph.inputs.extend(self.large.values())

    def placeholder(self, node: fx.Node) -> None:
        """An input of the Program."""
        type_ = node.meta["type"]
        self.values[node] = value(node.name, type_.dtype, type_.shape, self.opset)
        self.model.graph.inputs.append(self.values[node])

    def get_attr(self, node: fx.Node) -> None:
        """A stored tensor: an initializer, or an input if it is large."""
        name, graph = str(node.target), self.model.graph
        if name not in self.large and name not in graph.initializers:
            tensor = get_tensor(self.program.module, name).detach()
            made = value(name, tensor.dtype, tensor.shape, self.opset)
            if tensor.numel() > LARGE:
                self.large[name] = made
            else:
                made.const_value = TorchTensor(tensor, name)
                graph.register_initializer(made)
        self.values[node] = self.large.get(name) or graph.initializers[name]

    def call_function(self, node: fx.Node) -> None:
        """An operator."""
        function = _translation(node, self.opset)
        if function is None:
            raise BitlowerError(f"{self._place(node)} has no translation to ONNX")
        args = [self._argument(argument) for argument in node.args]
        kwargs = {key: self._argument(argument) for key, argument in node.kwargs.items()}
        if kwargs.get("dtype", 0) is None:
            kwargs["dtype"] = -1  # as torch's translations want it
        if node.target is ops.quantize:
            args.append(node.name)
        try:
            made = record(function, args, kwargs, self.opset, self.constants)
        except Exception as error:  # whatever a translation of torch's raises
            raise BitlowerError(f"{self._place(node)} cannot be translated to ONNX: {_reason(error)}") from error
        self.model.functions.update(made.functions)
        self.model.graph.extend(made.nodes)
        self.values[node] = made.result
        _describe(node, made.result, set(made.nodes))

    def output(self, node: fx.Node) -> None:
        """The outputs, in order."""
        self.model.graph.outputs.extend(self._argument(graph_results(node.graph)))

    def put_back(self) -> None:
        """Turn the inputs that stand for large tensors into initializers that read the Program's storage."""
        graph = self.model.graph
        del graph.inputs[len(graph.inputs) - len(self.large) :]
        for name, made in self.large.items():
            made.const_value = TorchTensor(get_tensor(self.program.module, name).detach(), name)
            if made.uses() or made.is_graph_output():
                graph.register_initializer(made)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return [self._argument(part) for part in argument]
        if isinstance(argument, torch.dtype):
            return onnx_dtype(argument)
        if isinstance(argument, (torch.device, torch.memory_format, torch.layout)):
            return str(argument)
        return argument

    def _place(self, node: fx.Node) -> str:
        at = f" at {node.meta['source']}" if node.meta.get("source") else ""
        return f"{self.program.source or 'the model'}: {node.target}{at}"


def _describe(node: fx.Node, result: Any, made: set[ir.Node]) -> None:
    """Give what was made for ``node`` its name, dtype and shape."""
    if isinstance(result, Sequence):
        for place, part in enumerate(result):
            part.name = f"{node.name}_{place}"
        for user in node.users:
            if "type" in user.meta:
                _describe(user, result[argument(user, "index")], made)
        return
    if result.producer() not in made:
        return
    result.name, type_ = node.name, node.meta.get("type")
    if type_ is not None:
        result.type, result.shape = _onnx_type(type_.dtype), ir.Shape([*type_.shape, *[2] * type_.dtype.is_complex])
    elif not any(user.target is operator.getitem for user in node.users):  # a size, and no sequence of tensors
        result.type, result.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])


def _onnx_type(dtype: torch.dtype) -> ir.TensorType:
    return ir.TensorType(onnx_dtype(dtype.to_real() if dtype.is_complex else dtype))


def _name_interface(model: ir.Model, program: Program) -> None:
    """Name inputs and outputs as the Program does, with its symbolic dimensions; no other value keeps such a name."""
    graph = model.graph
    _compute_constant_outputs(graph)
    wanted = {spec.name for spec in (*program.inputs, *program.outputs)}
    for made in [*graph.initializers.values(), *(made for node in graph for made in node.outputs)]:
        if made.name in wanted:
            made.name = f"{made.name}_value"
    for values, specs in ((graph.inputs, program.inputs), (graph.outputs, program.outputs)):
        for made, spec in zip(values, specs, strict=True):
            made.name = spec.name
            made.shape = ir.Shape(list(spec.type.shape))


def _compute_constant_outputs(graph: ir.Graph) -> None:
    """Let a node give each output that is a stored tensor: only what a node returns can have the Program's name."""
    for place, made in enumerate(graph.outputs):
        if made.name in graph.initializers:
            node = ir.Node("", "Identity", [made])
            node.outputs[0].type, node.outputs[0].shape = made.type, made.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _reason(error: BaseException) -> str:
    """The first line of the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress notes and warnings out of our output."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
