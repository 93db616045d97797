"""The text form of a Program: one line a node, stable from run to run, quantizers with bits, granularity and range."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bitlower.ir.program_data import ProgramData
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import get_tensor


def format_program(program: ProgramData) -> str:
    """All graphs, each under a line with its signature."""
    lines = [f"program level={program.level} task={program.task}"]
    lines += [f"size {name}: {length}" for name, length in sorted(program.lengths.items())]
    signature = f"({', '.join(map(str, program.inputs))}) -> ({', '.join(map(str, program.outputs))})"
    for name, module in program.graphs.items():
        lines.append(f"graph {name}{signature if name == 'model' else ''}:")
        lines += [f"  {line}" for node in module.graph.nodes if (line := format_node(module, node))]
    return "\n".join(lines) + "\n"


def format_node(module: fx.GraphModule, node: fx.Node) -> str:
    """One line; empty for placeholders (they stand in the signature) and tensors (they stand where they are used)."""
    if node.op in ("placeholder", "get_attr"):
        return ""
    if node.op == "output":
        return f"return {_format_arg(node.args[0])}"
    kind = f": {node.meta['type']}" if "type" in node.meta else ""
    arguments = [_format_arg(a) for a in node.args] + [f"{k}={_format_arg(v)}" for k, v in sorted(node.kwargs.items())]
    line = f"%{node.name}{kind} = {_format_target(node)}({', '.join(arguments)})"
    notes = []
    if "quantizer" in node.meta:
        notes.append(_format_quantizer(module, node, node.meta["quantizer"]))
    notes += [f"{name} {quantizer.spec}" for name, quantizer in node.meta.get("quantizers", {}).items()]
    if node.meta.get("path"):
        notes.append(node.meta["path"])
    return f"{line}  # {' · '.join(notes)}" if notes else line


def _format_target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return node.target if isinstance(node.target, str) else node.target.__name__


def _format_arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"@{arg.target}" if arg.op == "get_attr" else f"%{arg.name}"
    if isinstance(arg, tuple):
        return f"({', '.join(map(_format_arg, arg))})"
    if isinstance(arg, list):
        return f"[{', '.join(map(_format_arg, arg))}]"
    if isinstance(arg, float):
        return f"{arg:.9g}"
    if isinstance(arg, torch.dtype | torch.layout | torch.memory_format):
        return str(arg).removeprefix("torch.")
    return repr(arg) if isinstance(arg, str) else str(arg)


def _format_quantizer(module: fx.GraphModule, node: fx.Node, quantizer: Quantizer) -> str:
    return f"{quantizer.role} {quantizer.spec} {_format_range(module, node, quantizer)}"


def _format_range(module: fx.GraphModule, node: fx.Node, quantizer: Quantizer) -> str:
    """The smallest and the largest value of the grid, over all its scales."""
    scale_node, zero_node = node.args[1], node.args[2]
    if not isinstance(scale_node, fx.Node) or not isinstance(zero_node, fx.Node) or scale_node.op != "get_attr":
        return "dynamic"
    scale, zero = get_tensor(module, str(scale_node.target)), get_tensor(module, str(zero_node.target))
    if not bool(scale.any()):
        return "uncalibrated"
    grid = quantizer.spec.grid
    low = ((grid.quant_min - zero) * scale).min().item()
    high = ((grid.quant_max - zero) * scale).max().item()
    return f"[{low:.6g}, {high:.6g}]"
