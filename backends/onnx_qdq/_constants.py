"""The constants of a quantized ONNX model against those of its Program: codes, scales and zero points, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import fx

from bitlower.backends.onnx_qdq._session import Array
from bitlower.ir import Program, Quantizer, get_tensor, ops

_MOVES = frozenset({"Transpose", "Reshape", "Gather", "Cast", "Identity", "Squeeze", "Unsqueeze"})
"""Operators that leave codes and scales what they are."""
_PARAMETERS = {
    "DequantizeLinear": ((0, 1, 2),),
    "Mul": ((0, 1, None), (1, 0, None)),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
}
"""Consumers of codes: at which inputs they take the codes, their scale and their zero point."""


@dataclass(frozen=True)
class Constants:
    """How many constants were compared, and what does not agree."""

    tensors: int
    codes: int
    problems: tuple[str, ...]


def check_constants(program: Program, model: ir.Model) -> Constants:
    """Compare every weight's codes, and the scales and zero points of weights and static activations."""
    problems: list[str] = []
    lookup = _Codes(model.graph)
    tensors = codes = 0
    for node, _ in weights(program):
        expected = _tensor(program, node.args[0])
        assert expected is not None
        found, problem = lookup.find(str(node.args[0]), str(_attribute(node.args[0])), expected)
        tensors, codes = tensors + 1, codes + expected.size
        problems += [problem] if problem else []
        problems += _check_readers(program, node, found) if found is not None else []
    for node in program.graph.find_nodes(op="call_function", target=ops.quantize):
        value = lookup.values.get(node.name)
        problems += _check_activation(program, node, value) if value is not None else []
    return Constants(tensors, codes, tuple(problems))


def weights(program: Program) -> Iterator[tuple[fx.Node, Quantizer]]:
    """The ``dequantize`` nodes over stored codes."""
    for node, quantizer in program.quantizers():
        code = node.args[0]
        if node.target is ops.dequantize and isinstance(code, fx.Node) and code.op == "get_attr":
            yield node, quantizer


def quantizing_node(value: ir.Value) -> ir.Node | None:
    """The ``QuantizeLinear`` whose codes ``value`` holds, clipped or cast at most; None if there is none."""
    node = value.producer()
    while node is not None and node.op_type in ("Clip", "Cast", "Min", "Max", "Identity"):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def constant(value: ir.Value | None) -> Array | None:
    """The contents of a constant, seen through operators that only move it; None if the value is computed."""
    while value is not None:
        if value.const_value is not None:
            return value.const_value.numpy()
        node = value.producer()
        if node is not None and node.op_type == "Constant" and "value" in node.attributes:
            return node.attributes["value"].as_tensor().numpy()
        value = node.inputs[0] if node is not None and node.op_type in _MOVES else None
    return None


class _Codes:
    """The integer constants of a model, by name and by contents."""

    def __init__(self, graph: ir.Graph) -> None:
        from bitlower.backends.onnx_qdq._session import named_values

        self.values = named_values(graph)
        self._stored = [
            value
            for value in self.values.values()
            if value.const_value is not None and value.const_value.dtype.is_integer()
        ]
        self._by_shape: dict[tuple[int, ...], list[ir.Value]] = {}
        for value in self._stored:
            assert value.const_value is not None
            self._by_shape.setdefault(tuple(sorted(map(int, value.const_value.shape))), []).append(value)

    def find(self, node: str, name: str, expected: Array) -> tuple[ir.Value | None, str]:
        """The constant that holds ``expected`` as it is or transposed, and what is wrong if there is none."""
        for value in self._by_shape.get(tuple(sorted(expected.shape)), []):
            if _differing(value, expected) == 0:
                return value, ""
        named = self.values.get(name)
        count = _differing(named, expected) if named is not None else None
        if count is not None:
            return None, f"{count} of the {expected.size} codes of {name} differ from the program's"
        return None, f"the codes of {name} are nowhere in the model"


def _differing(value: ir.Value, expected: Array) -> int | None:
    """How many entries differ, in the better of both orientations; None if the shapes do not fit."""
    if value.const_value is None:
        return None
    stored = value.const_value.numpy().astype(np.int32)
    views = [stored, stored.T] if stored.ndim == 2 else [stored]
    counts = [int(np.count_nonzero(view != expected)) for view in views if view.shape == expected.shape]
    return min(counts, default=None)


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every node that computes with the codes in ``value``, and at which input."""
    for node, index in value.uses():
        if node.op_type in _MOVES and index == 0:
            for output in node.outputs:
                yield from _readers(output)
        else:
            yield node, index


def _check_readers(program: Program, node: fx.Node, codes: ir.Value) -> list[str]:
    """Whether all that dequantizes ``codes`` does so as ``node``, a dequantize node of the program, says."""
    name = str(_attribute(node.args[0]))
    scale, zero = _tensor(program, node.args[1]), _tensor(program, node.args[2])
    problems, readers = [], 0
    for reader, index in _readers(codes):
        for at_codes, at_scale, at_zero in _PARAMETERS.get(reader.op_type, ()):
            if index == at_codes:
                readers += 1
                problems += _compare(reader, at_scale, scale, f"the scale of {name}")
                problems += _compare(reader, at_zero, zero, f"the zero point of {name}") if at_zero else []
    return problems if readers or problems else [f"nothing dequantizes the codes of {name}"]


def _check_activation(program: Program, node: fx.Node, codes: ir.Value) -> list[str]:
    """Whether the static quantizer ``node`` has the program's scale and zero point, where it rounds and is read."""
    scale, zero = _tensor(program, node.args[1]), _tensor(program, node.args[2])
    source = quantizing_node(codes)
    if scale is None or source is None:
        return []
    problems = _compare(source, 1, scale, f"the scale of {node.name}")
    problems += _compare(source, 2, zero, f"the zero point of {node.name}")
    for reader, index in _readers(codes):
        for at_codes, at_scale, at_zero in _PARAMETERS.get(reader.op_type, ()):
            if index == at_codes and at_zero is not None:
                where = f"where {reader.op_type} reads it"
                problems += _compare(reader, at_scale, scale, f"the scale of {node.name} {where}")
                problems += _compare(reader, at_zero, zero, f"the zero point of {node.name} {where}")
    return problems


def _compare(reader: ir.Node, index: int, expected: Array | None, what: str) -> list[str]:
    """Compare the constant at an input with ``expected``; an absent zero point is zero."""
    if expected is None:
        return []
    value = reader.inputs[index] if index < len(reader.inputs) else None
    found = np.zeros(1, np.float32) if value is None else constant(value)
    if found is None:
        return [] if reader.op_type == "Mul" else [f"{what} is no constant in the model"]
    stored, wanted = found.astype(np.float32), expected.astype(np.float32)
    for layout in (stored, stored.T):
        flat = layout.ravel()
        if flat.size == wanted.size and np.array_equal(flat, wanted.ravel()):
            return []
    if stored.size == 1 and (wanted == stored.ravel()[0]).all():
        return []
    shown = f"{stored.ravel()[0]:.9g} for {wanted.ravel()[0]:.9g}"
    return [f"{what} is not the program's ({shown}{', …' if wanted.size > 1 else ''})"]


def _attribute(node: object) -> object:
    return node.target if isinstance(node, fx.Node) else node


def _tensor(program: Program, node: object) -> Array | None:
    """The stored tensor of a ``get_attr`` node; None for values that are computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    array: Array = get_tensor(program.module, str(node.target)).detach().cpu().numpy()
    return array
