"""Embedding tables: gathered as codes, packed where they have fewer than 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.narrow import PACKED, ROWS, is_packable, offset, pack_rows
from bitlower.backends.onnx_qdq.encoding.nbits import SMALLEST_BLOCK, Container, pack_zeros, spread_blocks
from bitlower.backends.onnx_qdq.graph.nodes import DOMAIN, Array, is_op, marker, source
from bitlower.backends.onnx_qdq.rewrite.codes import unfold_rows
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.linear import Form
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule
from bitlower.ir import packing


@dataclass(frozen=True)
class Table:
    """A quantized table ``[rows, columns]`` and what reads it: its codes, and scales and zero points as stored."""

    gather: ir.Node
    value: ir.Value
    codes: Array
    scale: Array
    zero: Array
    bits: int

    @property
    def name(self) -> str:
        """That of the codes."""
        return self.value.name or "table_codes"

    @property
    def stem(self) -> str:
        """That of the parameter."""
        return self.name.removesuffix("_codes")

    @property
    def ids(self) -> ir.Value:
        """Which rows are read."""
        return source(self.gather, 1)

    def packed(self, editor: Editor) -> ir.Value:
        """The rows of codes as bytes."""
        codes, bits = self.codes, self.bits
        shape = (codes.shape[0], packing.packed_bytes(codes.shape[1], bits))
        return editor.lazy(
            f"{self.name}{PACKED}", ROWS, ir.DataType.UINT8, shape, lambda: pack_rows(codes, bits)
        )  # fmt: skip


def table_rules(form: Form) -> tuple[Rule, ...]:
    """The rules for tables, in order."""
    codes = Rule("gather-codes", gather_codes)
    return (Rule("gather-blocks", gather_blocks), codes) if form == "onnxruntime" else (codes,)


def find_table(editor: Editor, node: ir.Node) -> Table | str | None:
    """The table that ``node`` gathers rows of; or why it is none."""
    dequantize = marker(node.inputs[0], "Dequantize") if is_op(node, "Gather") else None
    codes = editor.array(source(dequantize)) if dequantize is not None else None
    if dequantize is None or codes is None:
        return None
    if node.attributes.get_int("axis", 0) != 0 or codes.ndim != 2:
        return "it does not gather rows of a table"
    scale, zero = (np.asarray(editor.array(source(dequantize, position))) for position in (1, 2))
    spec = editor.specs.get(source(dequantize).name or "")
    bits = spec.grid.bits if spec is not None else 8 * codes.dtype.itemsize
    return Table(node, source(dequantize), codes, scale, zero, bits)


def gather_blocks(editor: Editor, node: ir.Node) -> str | None:
    """One com.microsoft.GatherBlockQuantized: rows of 2- or 4-bit codes become floats in one step."""
    table = find_table(editor, node)
    if not isinstance(table, Table):
        return table
    if table.bits not in (2, 4) or not is_packable(table.codes, table.bits):
        return f"a table of {table.codes.size} codes of {table.bits} bits has no such kernel"
    if table.scale.size == 1:
        return "the table has one scale"
    (_, depth), blocks = table.codes.shape, table.scale.shape[1]
    block = depth // blocks if blocks > 1 else 1 << max(depth - 1, SMALLEST_BLOCK - 1).bit_length()
    if block < SMALLEST_BLOCK or block & (block - 1) or depth * table.bits % 8:
        return f"blocks of {block} columns have no such kernel"
    scale = spread_blocks(table.scale, table.codes.shape, block).astype(np.float32)
    operands = [table.packed(editor), table.ids, editor.constant(f"{table.stem}_scale", scale)]
    signed = table.codes.dtype == np.int8
    zeros = pack_zeros(table.zero, table.codes.shape, Container(table.bits, block), is_signed=signed)
    if zeros is not None:
        operands.append(editor.constant(f"{table.stem}_zero_point", zeros))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": table.bits}
    editor.replace(
        node.outputs[0], editor.emit(node, "GatherBlockQuantized", operands, domain="com.microsoft", **attributes)
    )
    return APPLIED


def gather_codes(editor: Editor, node: ir.Node) -> str | None:
    """``Gather(Dequantize(table))`` → ``Dequantize(Gather(codes))``: only the rows that are read become floats.

    Codes of fewer than 8 bits lie in packed rows, which are unfolded after they are gathered.
    """
    table = find_table(editor, node)
    if not isinstance(table, Table):
        return table
    if table.scale.size > 1 and table.scale.shape[1] > 1:
        return "a row has more than one scale"
    (_, columns), bits, added = table.codes.shape, table.bits, 0
    if is_packable(table.codes, bits):
        added = offset(table.codes, bits)
        rows = editor.emit(node, "Gather", [table.packed(editor), table.ids], dtype=ir.DataType.UINT8, axis=0)
        gathered = unfold_rows(editor, node, rows, bits, columns)
        gathered.shape = node.outputs[0].shape
    else:
        gathered = editor.emit(node, "Gather", [table.value, table.ids], like=node.outputs[0], axis=0)
        gathered.dtype = ir.DataType.from_numpy(table.codes.dtype)
    parts = [
        _row_parameter(editor, table, f"{table.stem}_scale", table.scale),
        _row_parameter(editor, table, f"{table.stem}_zero_point", np.add(table.zero, added, dtype=np.float32)),
    ]
    editor.replace(node.outputs[0], editor.emit(node, "Dequantize", [gathered, *parts], domain=DOMAIN))
    return APPLIED


def _row_parameter(editor: Editor, table: Table, name: str, array: Array) -> ir.Value:
    """A scale or zero point for each row that is read; one for all where they are equal."""
    if (array == array.flat[0]).all():
        single = array.flat[0]
        return editor.constant(name if single else "zero", np.float32(single))
    rows = editor.constant(name, np.repeat(array, table.codes.shape[0] // array.shape[0], axis=0))
    return editor.emit(table.gather, "Gather", [rows, table.ids], axis=0)
