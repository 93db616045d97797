"""The scheme that a Program was really quantized with, tensor by tensor."""

from __future__ import annotations

from typing import Any

from torch import fx

from bitlower.ir import Program, Quantizer, get_tensor, kernels, ops
from bitlower.ir.quantizer_node import QuantizerNode


def resolved_tensors(program: Program) -> list[dict[str, Any]]:
    """One row for each quantized tensor, in execution order.

    Scale and zero point are there where one number is both for the whole tensor, at full float32 precision.
    """
    rows = []
    for node, quantizer in program.quantizers():
        if node.target is not ops.quantize:
            rows.append(_tensor_row(program, node, quantizer))
    return rows


def _tensor_row(program: Program, node: fx.Node, quantizer: Quantizer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": quantizer.tensor,
        "role": quantizer.role,
        "path": str(node.meta.get("path", "")),
        "spec": quantizer.spec.to_dict(),
    }
    for name, argument in zip(("scale", "zero_point"), _scale_arguments(node, quantizer), strict=True):
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            continue
        values = get_tensor(program.module, str(argument.target)).detach()
        row.setdefault("scale_shape", list(values.shape))
        if values.dim() == 0:
            row[name] = float(f"{values.item():.9g}") if name == "scale" else int(values.item())
    return row


def _scale_arguments(node: fx.Node, quantizer: Quantizer) -> tuple[Any, Any]:
    """Scale and zero point of a quantizer among the arguments of its node."""
    if not kernels.is_kernel(node):
        return QuantizerNode(node).scale, QuantizerNode(node).zero_point
    arguments = kernels.arguments(node)
    operand = next(name for name, other in node.meta["quantizers"].items() if other == quantizer)
    stem, _, index = operand.partition("_")  # table_0, rounded_1: an entry of a list
    if index:
        return arguments[f"{stem}_scales"][int(index)], arguments[f"{stem}_zero_points"][int(index)]
    return arguments.get(f"{operand}_scale"), arguments.get(f"{operand}_zero_point")


def float_bytes(program: Program) -> int:
    """What the stored tensors take in float32, scales and zero points left out; shared ones count once."""
    seen = {}
    for name, tensor in program.tensors():
        if "/quantizers." not in name:
            wide = tensor.is_floating_point() or name.endswith("_codes")
            seen[tensor.data_ptr(), tensor.numel()] = tensor.numel() * (4 if wide else tensor.element_size())
    return sum(seen.values())
