"""What viewers show of a model: notes on nodes and values, which compute nothing, and overlays beside the file.

Netron shows ``metadata_props`` of nodes and ``quantization_annotation`` of values; Model Explorer colors nodes by files
of node data, which know nodes by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bitlower.backends.artifact.card import LEDGER
from bitlower.backends.artifact.json_files import write_json
from bitlower.backends.onnx_qdq.graph.code_operators import code_operator
from bitlower.ir import Program, ops
from bitlower.ir.json_files import read_json
from bitlower.ir.quantizer_node import QuantizerNode

OVERLAYS = "overlays"
"""The folder of files of node data."""
MODULE, BITS, SQNR = "bitlower.module", "bitlower.bits", "bitlower.sqnr_db"
_PARAMETERS = "quant_parameter_tensor_names"
"""Where onnx-ir holds the annotation of a value."""
_CODES = ("QuantizeLinear", "DequantizeLinear")
"""The operators beside which codes get notes."""
_GRADIENTS = {BITS: ("#d73027", "#ffffbf", "#4575b4"), SQNR: ("#d73027", "#ffffbf", "#1a9850")}
"""Colors from the least value to the largest; few bits and much noise are red."""


@dataclass(frozen=True)
class Annotations:
    """What is known of a Program by the names of its nodes and of its weights' codes.

    Args:
        modules: the module path of each node.
        bits: of each quantized activation and of each weight's codes.
        sqnr: of each node that the ledger has, in decibels, after all passes.
    """

    modules: Mapping[str, str]
    bits: Mapping[str, int]
    sqnr: Mapping[str, float]


def annotations_of(program: Program, folder: Path) -> Annotations:
    """What ``program`` and the ledger in ``folder``, if there is one, say."""
    modules = {node.name: path for node in program.graph.nodes if (path := str(node.meta.get("path", "")))}
    bits = {}
    for node, quantizer in program.quantizers():
        stored = node.target is ops.dequantize and QuantizerNode(node).rounds_parameter
        bits[QuantizerNode(node).parameter if stored else node.name] = quantizer.spec.grid.bits
    return Annotations(modules, bits, dict(_ledger(folder)))


def annotate(model: ir.Model, notes: Annotations) -> None:
    """Note on each node its module, the bits of what it rounds or of the codes that it reads, and its noise.

    Values that a scale belongs to get the names of the scale and of the zero point. Nothing that computes is changed.
    """
    places: dict[ir.Node, str] = {}
    for node in reversed(list(model.graph)):
        if module := _module(node, notes, places):
            places[node] = module
            node.metadata_props[MODULE] = module
        if bits := _bits(node, notes):
            node.metadata_props[BITS] = str(bits)
        if (noise := _noise(node, notes)) is not None:
            node.metadata_props[SQNR] = f"{noise:g}"
        _annotate_codes(node)


def write_overlays(model: ir.Model, folder: Path, stage: str) -> list[str]:
    """Write a file of node data for each number that nodes of ``model`` have, of a ``stage`` if it has a name."""
    names = []
    for key, colors in _GRADIENTS.items():
        values = {str(node.name): float(node.metadata_props[key]) for node in model.graph if key in node.metadata_props}
        if values:
            metric = key.removeprefix("bitlower.")
            name = f"{OVERLAYS}/{stage}_{metric}.json" if stage else f"{OVERLAYS}/{metric}.json"
            gradient = [{"stop": place / 2, "bgColor": color} for place, color in enumerate(colors)]
            (folder / OVERLAYS).mkdir(exist_ok=True)
            results = {node: {"value": value} for node, value in values.items()}
            write_json(folder / name, {"name": metric, "results": results, "gradient": gradient})
            names.append(name)
    return names


def _ledger(folder: Path) -> Iterator[tuple[str, float]]:
    """The nodes of the last row, and their noise."""
    try:
        rows = read_json(folder / LEDGER).get("rows", [])
    except FileNotFoundError:
        return
    for layer in rows[-1].get("layers", []) if rows else []:
        if layer["sqnr_db"] is not None:
            yield layer["node"], float(layer["sqnr_db"])


def _module(node: ir.Node, notes: Annotations, places: Mapping[ir.Node, str]) -> str:
    """The module of a node's value; that of what reads it, where it is nameless and all readers are of one module."""
    for value in node.outputs:
        if module := notes.modules.get(str(value.name)):
            return module
    readers = {places.get(use.node, "") for value in node.outputs for use in value.uses()}
    return readers.pop() if len(readers) == 1 else ""


def _bits(node: ir.Node, notes: Annotations) -> int | None:
    """Of the weight's codes that a node reads, else of the activation that it rounds or reads."""
    for value in (*node.inputs, *node.outputs):
        if value is not None and (value.is_initializer() or value in node.outputs) and str(value.name) in notes.bits:
            return notes.bits[str(value.name)]
    return None


def _noise(node: ir.Node, notes: Annotations) -> float | None:
    return next((notes.sqnr[str(value.name)] for value in node.outputs if str(value.name) in notes.sqnr), None)


def _annotate_codes(node: ir.Node) -> None:
    """Name the scale and the zero point of the codes that a node writes or reads, where these are stored."""
    if node.op_type not in _CODES or node.domain:
        return
    operator = code_operator(node.op_type)
    codes = node.outputs[0] if operator.writes else node.inputs[0]
    places = operator.writes or (operator.reads[0].scale, operator.reads[0].zero_point)
    parameters = [node.inputs[at] if at is not None and at < len(node.inputs) else None for at in places]
    named = {
        key: str(value.name)
        for key, value in zip(("SCALE_TENSOR", "ZERO_POINT_TENSOR"), parameters, strict=True)
        if value is not None and value.is_initializer()
    }
    if codes is not None and "SCALE_TENSOR" in named:
        codes.meta[_PARAMETERS] = named
