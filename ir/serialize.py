"""A Program as one JSON document and a dictionary of tensors; no pickles, so loading runs no code of the file's.

Operators are written by name and looked up among torch's registered operators and a short list of Python functions.
Names are checked, for fx writes them into the Python source that it makes of a graph.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.document import FORMAT, FUNCTIONS, check_target, encode
from bitlower.ir.files import read_text
from bitlower.ir.fit import ValueSpec
from bitlower.ir.json_files import parse_json
from bitlower.ir.program import Program
from bitlower.ir.quantization.scheme import QuantSpec
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import UncompiledModule, set_tensor
from bitlower.ir.types import Length, Level, TensorType

_LIMIT = 1 << 30
"""Bytes of a document; the tokenizer's files are in it."""


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
    graphs: dict[str, fx.GraphModule] = {}
    for name, nodes in form["graphs"]:
        root = fx.GraphModule(torch.nn.Module(), fx.Graph())
        for key, value in values.items():
            if key.startswith(f"{name}/"):
                set_tensor(root, key.removeprefix(f"{name}/"), value)
        graphs[name] = UncompiledModule(root, _decode_graph(nodes))
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


def _decode_value(form: list[Any]) -> ValueSpec:
    return ValueSpec(form[0], _decode_type(form[1:]))


def _decode_type(form: list[Any]) -> TensorType:
    return TensorType(_torch_constant(form[0]), tuple(form[1]))


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name)
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise BitlowerError(f"torch.{name} is no constant that a saved program may name")
    return value


def _decode_quantizer(form: list[Any]) -> Quantizer:
    role, spec, tensor = form
    return Quantizer(role, QuantSpec.from_dict(spec), tensor)


def _decode_target(op: str, form: str) -> Any:
    check_target(op, form)
    if op != "call_function":
        return form
    if form in FUNCTIONS:
        return FUNCTIONS[form]
    try:
        target = reduce(getattr, form.removeprefix("op:").split("."), torch.ops)
    except AttributeError:
        target = None
    if not isinstance(target, torch._ops.OpOverload):
        raise BitlowerError(f"unknown operator {form.removeprefix('op:')!r}", hint="load the plugin that defines it")
    return target


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
