"""A Program as one JSON document and a dictionary of tensors; no pickles, so loading runs no code of the file's.

Operators are written by name and looked up among torch's registered operators and a short list of Python functions.
Names are checked, for fx writes them into the Python source that it makes of a graph.
"""

from __future__ import annotations

import base64
import json
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.files import read_text
from bitlower.ir.fit import ValueSpec
from bitlower.ir.json_files import parse_json
from bitlower.ir.program import Program, Quantizer, set_tensor
from bitlower.ir.scheme import QuantSpec
from bitlower.ir.types import Length, Level, TensorType

FORMAT = 4
_LIMIT = 1 << 30
"""Bytes of a document; the tokenizer's files are in it."""
_FUNCTIONS = {
    f"{function.__module__}:{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
        *(operator.neg, operator.not_, operator.getitem, math.ceil, math.floor, math.trunc, math.sqrt),
        *(torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_sum, torch.sym_ite),
    )
}
_TARGETS = {
    "placeholder": re.compile(r"[^\W\d]\w*"),
    "get_attr": re.compile(r"[^\s\"'\\]+"),
    "call_function": re.compile(r"[\w:.]+"),
    "output": re.compile("output"),
}


def encode(program: Program) -> tuple[str, dict[str, torch.Tensor]]:
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


def _distinct(program: Program) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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


def decode(document: str, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The inverse of :func:`encode`.

    Raises:
        BitlowerError: not such a document, another format's, or one that names unknown operators or tensors.
    """
    try:
        form = parse_json(document, finite=False)
        if not isinstance(form, dict) or form.get("format") != FORMAT:
            raise BitlowerError(f"not a program in format {FORMAT}, the one that this version reads")
        return _decode_program(form, tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SyntaxError) as error:
        raise BitlowerError(f"the saved program is damaged ({type(error).__name__}: {error})") from error


def _decode_program(form: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Program:
    values = dict(tensors)
    for name in form["parameters"]:
        values[name] = torch.nn.Parameter(values[name], values[name].is_floating_point())
    values |= {name: values[first] for name, first in form["aliases"].items()}
    graphs = {}
    for name, nodes in form["graphs"]:
        root = fx.GraphModule(torch.nn.Module(), fx.Graph())
        for key, value in values.items():
            if key.startswith(f"{name}/"):
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
        tuple(form["transposed"]),
        form["context_length"],
        {name: Length(*numbers) for name, numbers in form["lengths"].items()},
    )


def save(program: Program, folder: Path) -> None:
    """Write ``program.safetensors`` and ``program.json`` to ``folder``, each of them whole or not at all."""
    document, tensors = encode(program)
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / "program.safetensors") as path:
        save_file(_apart(tensors), path)
    with _replacing(folder / "program.json") as path:
        path.write_text(document)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, copied where they lie in one storage with another, which safetensors does not write."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone().contiguous() if place in seen else tensor.contiguous()
        seen.add(place)
    return apart


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` once it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(folder: Path) -> Program:
    """Read what :func:`save` wrote.

    Raises:
        BitlowerError: a file is missing or damaged.
    """
    try:
        return decode(read_text(folder / "program.json", _LIMIT), load_file(folder / "program.safetensors"))
    except (OSError, SafetensorError) as error:
        raise BitlowerError(f"{folder}: cannot read the saved program ({error})") from error


def _encode_value(spec: ValueSpec) -> list[Any]:
    return [spec.name, *_encode_type(spec.type)]


def _decode_value(form: list[Any]) -> ValueSpec:
    return ValueSpec(form[0], _decode_type(form[1:]))


def _encode_type(kind: TensorType) -> list[Any]:
    return [str(kind.dtype).removeprefix("torch."), list(kind.shape)]


def _decode_type(form: list[Any]) -> TensorType:
    return TensorType(_torch_constant(form[0]), tuple(form[1]))


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name)
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise BitlowerError(f"torch.{name} is no constant that a saved program may name")
    return value


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


def _decode_quantizer(form: list[Any]) -> Quantizer:
    role, spec, tensor = form
    return Quantizer(role, QuantSpec.from_dict(spec), tensor)


def _encode_target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        form = node.target
    elif isinstance(node.target, torch._ops.OpOverload):
        form = f"op:{node.target}"
    else:
        form = f"{node.target.__module__}:{node.target.__name__}"
        if _FUNCTIONS.get(form) is not node.target:
            raise BitlowerError(f"{describe(node)} calls a function that cannot be saved")
    _check_target(node.op, form)
    return form


def _check_target(op: str, form: str) -> None:
    if op not in _TARGETS or not _TARGETS[op].fullmatch(form):
        raise BitlowerError(f"a saved program has no node {op} {form!r}")


def _decode_target(op: str, form: str) -> Any:
    _check_target(op, form)
    if op != "call_function":
        return form
    if form in _FUNCTIONS:
        return _FUNCTIONS[form]
    try:
        target = reduce(getattr, form.removeprefix("op:").split("."), torch.ops)
    except AttributeError:
        target = None
    if not isinstance(target, torch._ops.OpOverload):
        raise BitlowerError(f"unknown operator {form.removeprefix('op:')!r}", hint="load the plugin that defines it")
    return target


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
            return _torch_constant(value)
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
        target = _decode_target(form["op"], form["target"])
        args = tuple(_decode_arg(form["args"], nodes))
        kwargs = {key: _decode_arg(value, nodes) for key, value in form.get("kwargs", {}).items()}
        if not all(key.isidentifier() for key in kwargs):
            raise BitlowerError(f"{form['target']} has arguments with the names {list(kwargs)}")
        node = graph.create_node(form["op"], target, args, kwargs, name=form["name"])
        meta = form.get("meta", {})
        node.meta = {key: meta[key] for key in ("path", "source") if key in meta}
        if "type" in meta:
            node.meta["type"] = _decode_type(meta["type"])
        if "quantizer" in meta:
            node.meta["quantizer"] = _decode_quantizer(meta["quantizer"])
        if "quantizers" in meta:
            node.meta["quantizers"] = {name: _decode_quantizer(value) for name, *value in meta["quantizers"]}
        nodes[form["name"]] = node
    return graph
