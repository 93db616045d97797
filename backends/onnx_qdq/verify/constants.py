"""The constants of a quantized ONNX model against those of its Program: codes, scales and zero points, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from bitlower.backends.onnx_qdq.encoding.narrow import SIGN_BIT, offset, part_name
from bitlower.backends.onnx_qdq.graph.code_operators import Reading, code_operator
from bitlower.backends.onnx_qdq.graph.structure import constant, quantizer_inputs, readers
from bitlower.backends.onnx_qdq.runtime.session import Array, named_values
from bitlower.backends.onnx_qdq.translate.unfold import conv_reason, unfolded_kernel
from bitlower.backends.onnx_qdq.verify.packed_constants import (
    check_blocks,
    check_packed,
    check_rows,
    packed_tables,
    packed_weights,
)
from bitlower.ir import Program, Quantizer, get_tensor, ops
from bitlower.ir.dataflow import CONVOLUTION, EMBEDDING, LINEAR
from bitlower.ir.operators import argument
from bitlower.ir.quantizer_node import QuantizerNode


@dataclass(frozen=True)
class Constants:
    """How many weight tensors and codes were compared, and what does not agree."""

    tensors: int
    codes: int
    problems: tuple[str, ...]


def check_constants(program: Program, model: ir.Model) -> Constants:
    """Compare every weight's codes, and the scales and zero points of weights and static activations.

    A quantizer that is not in the model is a problem too.
    """
    problems: list[str] = []
    stored = _Stored(named_values(model.graph))
    tensors = codes = 0
    packed, tables = packed_weights(model.graph), packed_tables(model.graph)
    for node, name, expected in weights(program):
        tensors, codes = tensors + 1, codes + expected.size
        multiplied, gathered = packed.get(name, []), tables.get(name, [])
        for linear in multiplied:
            problems += check_packed(linear, name, expected, *_range(program, node))
        for gather in gathered:
            problems += _check_table(program, node, name, expected, gather, stored.values)
        unfolded = any(gather.attributes.get_int("axis", 0) == -1 for gather in gathered)
        checked = (LINEAR if multiplied or unfolded else frozenset()) | (EMBEDDING if gathered else frozenset())
        if checked and all(user.target in checked for user in node.users):
            continue
        value, problem = stored.find(name, expected)
        problems += [problem] if problem else []
        signed = expected.dtype == np.int8
        problems += _check_weight(program, node, name, value, stored.values, signed=signed) if value is not None else []
    for node in program.graph.find_nodes(op="call_function", target=ops.quantize):
        value = stored.values.get(node.name)
        missing = [f"the quantizer {describe_quantizer(node)} is not in the model"]
        problems += missing if value is None else _check_activation(program, node, value)
    return Constants(tensors, codes, tuple(problems))


def weights(program: Program) -> Iterator[tuple[fx.Node, str, Array]]:
    """The ``dequantize`` nodes over stored codes, with the name of the codes and the codes.

    Codes that are read in slices of their inputs are stored so, and given slice by slice.
    """
    for node in program.graph.find_nodes(op="call_function", target=ops.dequantize):
        view = QuantizerNode(node)
        codes = _tensor(program, view.value)
        if codes is None:
            continue
        codes = _as_multiplied(node, codes)
        name, slices = view.parameter, {_slice(user) for user in node.users}
        for ends in sorted(slices, key=lambda ends: ends or (0, 0)):
            yield (node, f"{name}{part_name(*ends)}", codes[:, slice(*ends)]) if ends else (node, name, codes)


def _as_multiplied(node: fx.Node, codes: Array) -> Array:
    """Codes in the shape of the file: the kernel of an unfolded convolution is a matrix there."""
    unfolded = any(user.target in CONVOLUTION and not conv_reason(user) for user in node.users)
    return unfolded_kernel(codes) if unfolded else codes


def _slice(user: fx.Node) -> tuple[int, int] | None:
    """Which inputs ``user`` takes of a weight; None if it reads all of it."""
    if user.target is not torch.ops.aten.slice.Tensor or argument(user, "dim") != 1:
        return None
    start, stop = argument(user, "start"), argument(user, "end")
    return (start, stop) if isinstance(start, int) and isinstance(stop, int) else None


def describe_quantizer(node: fx.Node) -> str:
    """The node, what it quantizes, and where."""
    quantizer: Quantizer = node.meta["quantizer"]
    place = f" in {node.meta['path']}" if node.meta.get("path") else ""
    return f"%{node.name} ({quantizer.role} of %{quantizer.tensor}{place})"


class _Stored:
    """The integer constants of a model, by name and by contents."""

    def __init__(self, values: dict[str, ir.Value]) -> None:
        self.values = values
        self._by_shape: dict[tuple[int, ...], list[ir.Value]] = {}
        for value in values.values():
            if value.const_value is not None and value.const_value.dtype.is_integer():
                self._by_shape.setdefault(_sorted_shape(value.const_value.shape.numpy()), []).append(value)

    def find(self, name: str, expected: Array) -> tuple[ir.Value | None, str]:
        """The constant that holds ``expected`` as it is or transposed, and what is wrong if there is none."""
        alike = self._by_shape.get(_sorted_shape(expected.shape), [])
        for value in sorted(alike, key=lambda value: value.name != name):
            if _differing(value, expected) == 0:
                return value, ""
        named = self.values.get(name)
        count = _differing(named, expected) if named is not None else None
        if count is not None:
            return None, f"{count} of the {expected.size} codes of {name} are not the program's"
        return None, f"the codes of {name} are nowhere in the model"


def _sorted_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(shape))


def _differing(value: ir.Value, expected: Array) -> int | None:
    """How many entries differ, in the better of both orientations; None if the shapes do not fit."""
    if value.const_value is None:
        return None
    stored = value.const_value.numpy()
    if stored.dtype == np.uint8 and expected.dtype == np.int8:
        stored = (stored ^ np.uint8(SIGN_BIT)).view(np.int8)
    stored = stored if stored.dtype == expected.dtype else stored.astype(np.int32)
    views = [stored, stored.T] if stored.ndim == 2 else [stored]
    counts = [int(np.count_nonzero(view != expected)) for view in views if view.shape == expected.shape]
    return min(counts, default=None)


def _check_table(
    program: Program, node: fx.Node, name: str, codes: Array, gather: ir.Node, values: dict[str, ir.Value]
) -> list[str]:
    """What of a gathered table with packed rows is not the program's."""
    bits = node.meta["quantizer"].spec.grid.bits
    problems = check_rows(gather, name, codes, bits)
    if not code_operator(gather.op_type).passes_on:
        return problems + check_blocks(gather, name, codes, *_range(program, node))
    return problems + _check_weight(program, node, name, gather.outputs[0], values, added=offset(codes, bits))


def _check_weight(
    program: Program,
    node: fx.Node,
    name: str,
    codes: ir.Value,
    values: dict[str, ir.Value],
    *,
    added: int = 0,
    signed: bool = False,
) -> list[str]:
    """Whether all that reads ``codes`` takes them as ``node``, a dequantize node of the program, says.

    ``added`` is what the stored codes, and so their zero points, are above the program's; ``signed`` codes of 8 bits
    may be read as unsigned ones.
    """
    scale, zero = _range(program, node)
    problems, count = [], 0
    for reader, at in _readings(codes):
        count += 1
        more = SIGN_BIT if signed and _is_unsigned(reader.inputs[at.codes]) else added
        shifted = zero + np.float32(more) if zero is not None else None
        problems += _check_input(reader, at.scale, scale, f"the scale of {name}")
        problems += _check_input(reader, at.zero_point, shifted, f"the zero point of {name}")
        if at.scale is None and code_operator(reader.op_type).integer:  # what follows it multiplies with the scale
            scales = constant(values.get(f"{name.partition('_codes')[0]}_scale"))
            problems += _compare(scales, scale, f"the scale of {name}")
    return problems if count or problems else [f"nothing dequantizes the codes of {name}"]


def _is_unsigned(codes: ir.Value | None) -> bool:
    """Whether a reader of 8-bit codes gets them unsigned: stored so, or turned by their highest bit."""
    while codes is not None and codes.const_value is None:
        node = codes.producer()
        if node is None or node.op_type == "BitwiseXor":
            return node is not None
        codes = node.inputs[0]
    return codes is not None and codes.dtype is ir.DataType.UINT8


def _check_activation(program: Program, node: fx.Node, codes: ir.Value) -> list[str]:
    """Whether the static quantizer ``node`` has the program's scale and zero point, where it rounds and is read."""
    scale, zero = _range(program, node)
    source = quantizer_inputs(codes)
    if scale is None or source is None:
        return []
    problems = _compare(constant(source.scale), scale, f"the scale of {node.name}")
    problems += _compare(_constant_or_zero(source.zero_point), zero, f"the zero point of {node.name}")
    for reader, at in _readings(codes):
        problems += _check_input(reader, at.scale, scale, f"the scale of {node.name} at {reader.op_type}")
        problems += _check_input(reader, at.zero_point, zero, f"the zero point of {node.name} at {reader.op_type}")
    return problems


def _readings(codes: ir.Value) -> Iterator[tuple[ir.Node, Reading]]:
    """Who reads ``codes``, and at which of its inputs they, their scale and their zero point are."""
    for reader, index in readers(codes):
        yield from ((reader, at) for at in code_operator(reader.op_type).reads if at.codes == index)


def _check_input(reader: ir.Node, index: int | None, expected: Array | None, what: str) -> list[str]:
    if index is None:
        return []
    value = reader.inputs[index] if index < len(reader.inputs) else None
    return _compare(_constant_or_zero(value), expected, what)


def _constant_or_zero(value: ir.Value | None) -> Array | None:
    return np.zeros(1, np.float32) if value is None else constant(value)


def _compare(actual: Array | None, expected: Array | None, what: str) -> list[str]:
    """Compare scales or zero points: in either orientation, and each repeated over the entries that share it."""
    if expected is None:
        return []
    if actual is None:
        return [f"{what} is no constant in the model"]
    stored, wanted = actual.astype(np.float32), expected.astype(np.float32).ravel()
    longer = max(stored.size, wanted.size)
    if longer % stored.size == 0 and longer % wanted.size == 0:
        spread = np.repeat(wanted, longer // wanted.size)
        if any(np.array_equal(np.repeat(view.ravel(), longer // stored.size), spread) for view in (stored, stored.T)):
            return []
    return [f"{what} is not the program's: {stored.ravel()[0]:.9g} in place of {wanted[0]:.9g}"]


def _range(program: Program, node: fx.Node) -> tuple[Array | None, Array | None]:
    """Scale and zero point of a quantizer; None where they are computed."""
    view = QuantizerNode(node)
    return _tensor(program, view.scale), _tensor(program, view.zero_point)


def _tensor(program: Program, node: object) -> Array | None:
    """The stored tensor of a ``get_attr`` node; None for values that are computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    array: Array = get_tensor(program.module, str(node.target)).detach().cpu().numpy()
    return array
