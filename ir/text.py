"""The text form of a Program: one line for each tensor and node, stable from run to run, with bits and ranges.

:func:`bitlower.ir.parse.parse` reads it. Left out are the values of tensors, lines of the model's source, and what the
Program has beside its graphs (configuration, files, passes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch
from torch import fx

from bitlower.ir.program_data import ProgramData
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.tensors import get_tensor


def format_program(program: ProgramData) -> str:
    """All graphs, each under a line with its signature."""
    lines = [f"program level={program.level} task={program.task}"]
    lines += [f"size {name}: {length}" for name, length in sorted(program.lengths.items())]
    signature = f"({', '.join(map(str, program.inputs))}) -> ({', '.join(map(str, program.outputs))})"
    for name, module in program.graphs.items():
        lines.append(f"graph {name}{signature if name == 'model' else ''}:")
        lines += [f"  {line}" for line in format_tensors(module)]
        lines += [f"  {line}" for node in module.graph.nodes if (line := format_node(module, node))]
    return "\n".join(lines) + "\n"


def format_tensors(module: fx.GraphModule) -> list[str]:
    """A line for each tensor that the graph reads: name, dtype and shape, and whether it is a parameter."""
    names = sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"})
    lines = []
    for name in names:
        tensor = get_tensor(module, name)
        kind = " parameter" if isinstance(tensor, torch.nn.Parameter) else ""
        lines.append(f"@{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{kind}")
    return lines


def format_node(module: fx.GraphModule, node: fx.Node) -> str:
    """One line; empty for placeholders (they stand in the signature) and tensors (they have lines of their own)."""
    if node.op in ("placeholder", "get_attr"):
        return ""
    if node.op == "output":
        return f"return {_format_arg(node.args[0])}"
    kind = f": {node.meta['type']}" if "type" in node.meta else ""
    arguments = [_format_arg(a) for a in node.args] + [f"{k}={_format_arg(v)}" for k, v in sorted(node.kwargs.items())]
    line = f"%{node.name}{kind} = {_format_target(node)}({', '.join(arguments)})"
    notes = []
    if "quantizer" in node.meta:
        quantizer: Quantizer = node.meta["quantizer"]
        of = f" of {quantizer.tensor}" if quantizer.tensor != operand_name(node) else ""
        notes.append(f"{quantizer.role} {quantizer.spec} {_format_range(module, node)}{of}")
    notes += [f"{name}: {q.role} {q.spec} of {q.tensor}" for name, q in node.meta.get("quantizers", {}).items()]
    if node.meta.get("path"):
        notes.append(node.meta["path"])
    return f"{line}  # {' · '.join(notes)}" if notes else line


def operand_name(node: fx.Node) -> str:
    """What the first operand of a quantizer is called: the name of a tensor, or of a node."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return str(value.target) if value.op == "get_attr" else value.name


def _format_target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    if isinstance(node.target, str):
        return node.target
    return f"{node.target.__module__.lstrip('_')}.{node.target.__name__}"


def _format_arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"@{arg.target}" if arg.op == "get_attr" else f"%{arg.name}"
    if isinstance(arg, tuple):
        return f"({', '.join(map(_format_arg, arg))})"
    if isinstance(arg, list):
        return f"[{', '.join(map(_format_arg, arg))}]"
    if isinstance(arg, slice):
        return f"slice({', '.join(map(_format_arg, (arg.start, arg.stop, arg.step)))})"
    if isinstance(arg, torch.dtype | torch.layout | torch.memory_format):
        return str(arg).removeprefix("torch.")
    return repr(arg)


def _format_range(module: fx.GraphModule, node: fx.Node) -> str:
    """The smallest and the largest value of the grid, over all its scales."""
    view = QuantizerNode(node)
    if not view.is_static:
        return "dynamic"
    if not view.is_calibrated:
        return "uncalibrated"
    grid, (scale, zero) = view.spec.grid, view.range(module)
    low = ((grid.quant_min - zero) * scale).min().item()
    high = ((grid.quant_max - zero) * scale).max().item()
    return f"[{low:.6g}, {high:.6g}]"


def html_table(caption: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table for notebooks, every cell escaped; the first cell of a row is its heading.

    >>> html_table("a < b", [("x", "1")])
    '<table><caption>a &lt; b</caption><tbody><tr><th scope="row">x</th><td>1</td></tr></tbody></table>'
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    titles = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"<table><caption>{escape(caption)}</caption>{titles}<tbody>{body}</tbody></table>"
