"""A Program as one JSON document and a dictionary of tensors; no pickles, so loading runs no code of the file's.

Operators are written by name and looked up among torch's registered operators and a short list of Python functions.
"""

from __future__ import annotations

import base64
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.program import Program, Quantizer, ValueSpec, set_tensor
from bitlower.ir.scheme import QuantSpec
from bitlower.ir.types import Level, TensorType

FORMAT = 1
_MODULES = {"_operator": operator, "math": math, "torch": torch}


def encode(program: Program) -> tuple[str, dict[str, torch.Tensor]]:
    """The document (canonical JSON) and the tensors, by ``graph/name``."""
    document = {
        "format": FORMAT,
        "level": str(program.level),
        "task": program.task,
        "inputs": [_encode_value(spec) for spec in program.inputs],
        "outputs": [_encode_value(spec) for spec in program.outputs],
        "config": program.config,
        "assets": {name: base64.b64encode(data).decode() for name, data in sorted(program.assets.items())},
        "source": program.source,
        "passes": program.passes,
        "graphs": {name: [_encode_node(n) for n in module.graph.nodes] for name, module in program.graphs.items()},
        "parameters": sorted(name for name, t in program.tensors() if isinstance(t, torch.nn.Parameter)),
    }
    tensors = {name: tensor.detach() for name, tensor in program.tensors()}
    return json.dumps(document, sort_keys=True, separators=(",", ":")), tensors


def decode(document: str, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The inverse of :func:`encode`.

    Raises:
        BitlowerError: another format's document, or one that names unknown operators or tensors.
    """
    form = json.loads(document)
    if form.get("format") != FORMAT:
        raise BitlowerError(f"a program in format {form.get('format')}, this version reads {FORMAT}")
    parameters = set(form["parameters"])
    graphs = {}
    for name, nodes in form["graphs"].items():
        root = fx.GraphModule(torch.nn.Module(), fx.Graph())
        for key, tensor in tensors.items():
            if key.startswith(f"{name}/"):
                value = torch.nn.Parameter(tensor, tensor.is_floating_point()) if key in parameters else tensor
                set_tensor(root, key.removeprefix(f"{name}/"), value)
        graphs[name] = fx.GraphModule(root, _decode_graph(nodes))
    return Program(
        graphs,
        Level(form["level"]),
        form["task"],
        tuple(_decode_value(v) for v in form["inputs"]),
        tuple(_decode_value(v) for v in form["outputs"]),
        form["config"],
        {name: base64.b64decode(data) for name, data in form["assets"].items()},
        form["source"],
        form["passes"],
    )


def save(program: Program, folder: Path) -> None:
    """Write ``program.json`` and ``program.safetensors`` to ``folder``."""
    document, tensors = encode(program)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.json").write_text(document)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "program.safetensors")


def load(folder: Path) -> Program:
    """Read what :func:`save` wrote."""
    return decode((folder / "program.json").read_text(), load_file(folder / "program.safetensors"))


def _encode_value(spec: ValueSpec) -> list[Any]:
    return [spec.name, *_encode_type(spec.type)]


def _decode_value(form: list[Any]) -> ValueSpec:
    return ValueSpec(form[0], _decode_type(form[1:]))


def _encode_type(kind: TensorType) -> list[Any]:
    return [str(kind.dtype).removeprefix("torch."), list(kind.shape)]


def _decode_type(form: list[Any]) -> TensorType:
    return TensorType(getattr(torch, form[0]), tuple(form[1]))


def _encode_node(node: fx.Node) -> dict[str, Any]:
    form: dict[str, Any] = {"name": node.name, "op": node.op, "target": _encode_target(node)}
    form["args"] = _encode_arg(list(node.args))
    if node.kwargs:
        form["kwargs"] = {key: _encode_arg(value) for key, value in node.kwargs.items()}
    meta: dict[str, Any] = {key: node.meta[key] for key in ("path", "source") if node.meta.get(key)}
    if "type" in node.meta:
        meta["type"] = _encode_type(node.meta["type"])
    if "quantizer" in node.meta:
        quantizer: Quantizer = node.meta["quantizer"]
        meta["quantizer"] = [quantizer.role, quantizer.spec.to_dict(), quantizer.tensor]
    if meta:
        form["meta"] = meta
    return form


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return f"op:{node.target}"
    module = getattr(node.target, "__module__", "")
    if module in _MODULES:
        return f"{module}:{node.target.__name__}"
    raise BitlowerError(f"%{node.name} calls {node.target}, which cannot be saved")


def _decode_target(form: str) -> Any:
    kind, _, name = form.partition(":")
    if kind == "op":
        namespace, operator_name, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), operator_name), overload)
    if kind in _MODULES and name:
        return getattr(_MODULES[kind], name)
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


def _decode_arg(form: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(form, list):
        return [_decode_arg(f, nodes) for f in form]
    if not isinstance(form, dict):
        return form
    ((kind, value),) = form.items()
    match kind:
        case "%":
            return nodes[value]
        case "tuple":
            return tuple(_decode_arg(f, nodes) for f in value)
        case "float":
            return float(value)
        case "torch":
            return getattr(torch, value)
        case "device":
            return torch.device(value)
        case "slice":
            return slice(*(_decode_arg(f, nodes) for f in value))
        case _:
            raise BitlowerError(f"unknown argument form {kind!r} in a saved program")


def _decode_graph(forms: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for form in forms:
        args = tuple(_decode_arg(form["args"], nodes))
        kwargs = {key: _decode_arg(value, nodes) for key, value in form.get("kwargs", {}).items()}
        node = graph.create_node(form["op"], _decode_target(form["target"]), args, kwargs, name=form["name"])
        meta = form.get("meta", {})
        node.meta = {key: meta[key] for key in ("path", "source") if key in meta}
        if "type" in meta:
            node.meta["type"] = _decode_type(meta["type"])
        if "quantizer" in meta:
            role, spec, tensor = meta["quantizer"]
            node.meta["quantizer"] = Quantizer(role, QuantSpec.from_dict(spec), tensor)
        nodes[form["name"]] = node
    return graph
