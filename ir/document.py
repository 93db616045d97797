"""A Program as a document: its JSON form, in which operators are written by name, and its tensors by name."""

from __future__ import annotations

import base64
import json
import math
import operator
import re
from typing import Any

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.fit import ValueSpec
from bitlower.ir.program_data import ProgramData
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.types import TensorType

FORMAT = 5
"""Of the document; one version reads one format."""
FUNCTIONS = {
    f"{function.__module__}:{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
        *(operator.neg, operator.not_, operator.getitem, math.ceil, math.floor, math.trunc, math.sqrt),
        *(torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_sum, torch.sym_ite),
    )
}
TARGETS = {
    "placeholder": re.compile(r"[^\W\d]\w*"),
    "get_attr": re.compile(r"[^\s\"'\\]+"),
    "call_function": re.compile(r"[\w:.]+"),
    "output": re.compile("output"),
}


def encode(program: ProgramData) -> tuple[str, dict[str, torch.Tensor]]:
    """The document (canonical JSON) and the tensors, by ``graph/name``; one that has several names comes once.

    Raises:
        BitlowerError: a graph calls something that cannot be saved.
    """
    tensors, aliases = _distinct(program)
    document = {
        "format": FORMAT,
        "level": str(program.level),
        "task": program.task,
        "inputs": [_encode_value(spec) for spec in program.inputs],
        "outputs": [_encode_value(spec) for spec in program.outputs],
        "config": json.loads(json.dumps(program.config)),
        "assets": {name: base64.b64encode(data).decode() for name, data in sorted(program.assets.items())},
        "source": program.source,
        "passes": program.passes,
        "transposed": list(program.transposed),
        "context_length": program.context_length,
        "lengths": {name: [n.minimum, n.maximum, n.multiple] for name, n in program.lengths.items()},
        "graphs": [[name, [_encode_node(n) for n in module.graph.nodes]] for name, module in program.graphs.items()],
        "parameters": sorted(name for name, t in tensors.items() if isinstance(t, torch.nn.Parameter)),
        "aliases": aliases,
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return text, {name: tensor.detach() for name, tensor in tensors.items()}


def _distinct(program: ProgramData) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor by its first name, and the first name of every other name (tied weights)."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, t in program.tensors():
        place = (t.data_ptr(), t.dtype, t.shape, t.stride(), isinstance(t, torch.nn.Parameter))
        if t.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
        else:
            tensors[name] = t
    return tensors, aliases


def _encode_value(spec: ValueSpec) -> list[Any]:
    return [spec.name, *_encode_type(spec.type)]


def _encode_type(kind: TensorType) -> list[Any]:
    return [str(kind.dtype).removeprefix("torch."), list(kind.shape)]


def _encode_node(node: fx.Node) -> dict[str, Any]:
    form: dict[str, Any] = {"name": node.name, "op": node.op, "target": _encode_target(node)}
    form["args"] = _encode_arg(list(node.args))
    if node.kwargs:
        form["kwargs"] = {key: _encode_arg(value) for key, value in node.kwargs.items()}
    meta: dict[str, Any] = {key: node.meta[key] for key in ("path", "source") if node.meta.get(key)}
    if "type" in node.meta:
        meta["type"] = _encode_type(node.meta["type"])
    if "quantizer" in node.meta:
        meta["quantizer"] = _encode_quantizer(node.meta["quantizer"])
    if "quantizers" in node.meta:
        meta["quantizers"] = [[name, *_encode_quantizer(value)] for name, value in node.meta["quantizers"].items()]
    if meta:
        form["meta"] = meta
    return form


def _encode_quantizer(quantizer: Quantizer) -> list[Any]:
    return [quantizer.role, quantizer.spec.to_dict(), quantizer.tensor]


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        form = node.target
    elif isinstance(node.target, torch._ops.OpOverload):
        form = f"op:{node.target}"
    else:
        form = f"{node.target.__module__}:{node.target.__name__}"
        if FUNCTIONS.get(form) is not node.target:
            raise BitlowerError(f"{describe(node)} calls a function that cannot be saved")
    check_target(node.op, form)
    return form


def _encode_arg(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return {"%": arg.name}
    if isinstance(arg, list | fx.immutable_collections.immutable_list):
        return [_encode_arg(a) for a in arg]
    if isinstance(arg, tuple):
        return {"tuple": [_encode_arg(a) for a in arg]}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    if isinstance(arg, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(arg).removeprefix("torch.")}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    if isinstance(arg, slice):
        return {"slice": [_encode_arg(a) for a in (arg.start, arg.stop, arg.step)]}
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    raise BitlowerError(f"an argument of type {type(arg).__name__} cannot be saved")


def check_target(op: str, form: str) -> None:
    """See that a node may be written so: fx writes names into the Python source that it makes of a graph.

    Raises:
        BitlowerError: it may not.
    """
    if op not in TARGETS or not TARGETS[op].fullmatch(form):
        raise BitlowerError(f"a saved program has no node {op} {form!r}")
