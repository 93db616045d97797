"""From ``torch.export``'s ExportedProgram to a Program: names, types, module paths and source lines; no guards."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from bitlower.ir import BitlowerError, CheckError, Level, Program, TensorType, ValueSpec, copy_module, get_tensor

_DIM_NAMES = ("batch", "sequence")
_PYTHON_ROOTS = tuple(str(Path(p).resolve()) for p in torch.__path__)
_REPLAY_TOLERANCE = 1e-4


def to_program(exported: ExportedProgram, *, task: str) -> Program:
    """The traced graph as a Program at level ``float``; dropout, asserts, guards and writes in place removed.

    Raises:
        BitlowerError: the graph calls something that is no operator.
    """
    if any(_writes(node) for node in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about itself
            exported = exported.run_decompositions({})
    module = exported.module(check_guards=False)
    graph = module.graph
    symbols = _symbol_names(graph)
    for node in list(graph.nodes):
        if _is_noise(node):
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        else:
            node.meta = _translate_meta(node, symbols)
    _reject_foreign(graph)
    for node in graph.find_nodes(op="get_attr"):
        tensor = get_tensor(module, str(node.target))
        node.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))
    flat, _ = torch.utils._pytree.tree_flatten(graph.output_node().args[0])
    graph.output_node().args = (tuple(flat),)
    graph.set_codegen(fx.graph.CodeGen())
    program = Program(
        {"model": copy_module(module)},
        Level.FLOAT,
        task,
        tuple(ValueSpec(str(n.target), n.meta["type"]) for n in graph.find_nodes(op="placeholder")),
        tuple(ValueSpec(name, node.meta["type"]) for name, node in zip(_output_names(exported), flat, strict=True)),
    )
    program.recompile()
    return program


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def explain_failure(model: str) -> Iterator[None]:
    """Turn whatever tracing raises into one error that names the model's own line."""
    try:
        yield
    except BitlowerError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        line = _model_line(error)
        raise BitlowerError(f"{model} cannot be traced{f' at {line}' if line else ''}: {reason}") from error


def check_replay(program: Program, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Compare the trace with the model on inputs of another shape.

    Raises:
        CheckError: an output differs by more than 1e-4 of its own spread: the trace has a shape baked in.
    """
    with torch.no_grad():
        expected = model(**inputs)
        actual = program(**inputs)
    for name, value in actual.items():
        reference = expected[name]
        spread = float(reference.std()) if reference.numel() > 1 else 1.0
        error = float((value - reference).abs().max())
        if value.shape != reference.shape or not error <= _REPLAY_TOLERANCE * max(spread, 1e-6):
            shape = list(next(iter(inputs.values())).shape)
            raise CheckError(f"the trace of {type(model).__name__} gives another {name!r} at the shape {shape}")


def _writes(node: fx.Node) -> bool:
    """Whether ``node`` changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_noise(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op == "call_module":
        return name == "_guards_fn"
    kinds = ("aten.dropout.default", "aten._assert", "aten.sym_constrain_range", "aten.detach.", "aten.lift_fresh")
    return node.op == "call_function" and name.startswith(kinds)


def _symbol_names(graph: fx.Graph) -> dict[str, str]:
    """Torch's symbols by the name of the input dimension where they come first."""
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                fallback = f"{node.target}_{axis}"
                name = _DIM_NAMES[axis] if axis < len(_DIM_NAMES) else fallback
                names.setdefault(str(size), fallback if name in names.values() else name)
    return names


def _translate_meta(node: fx.Node, symbols: Mapping[str, str]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        meta["type"] = TensorType(value.dtype, tuple(_dim(size, symbols) for size in value.shape))
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0].removeprefix("L['self'].") if stack else ""
    if path and not path.startswith("_"):
        meta["path"] = path
    source = _source_line(node.meta.get("stack_trace") or "")
    if source:
        meta["source"] = source
    return meta


def _dim(size: int | torch.SymInt, symbols: Mapping[str, str]) -> int | str:
    if not isinstance(size, torch.SymInt):
        return size
    text = re.sub(r"[a-z]+\d+", lambda match: symbols.get(match[0], match[0]), str(size))
    return int(text) if text.isdigit() else text


def _source_line(stack_trace: str) -> str:
    """``file.py:line: code`` of the innermost frame outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    for path, line, code in reversed(frames):
        if not str(Path(path).resolve()).startswith(_PYTHON_ROOTS):
            return f"{Path(path).name}:{line}: {code.strip()}"
    return ""


def _model_line(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        foreign = frame.filename.startswith(_PYTHON_ROOTS) or "/transformers/exporters/" in frame.filename
        if not foreign and Path(frame.filename).resolve().parent != Path(__file__).resolve().parent:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line or ''}".rstrip(": ")
    return ""


def _output_names(exported: ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    count = len(exported.graph_signature.user_outputs)
    keys = spec.context if spec is not None and isinstance(spec.context, list) else None
    if keys is not None and len(keys) == count and all(isinstance(key, str) for key in keys):
        return list(keys)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _reject_foreign(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            where = f" at {node.meta['source']}" if node.meta.get("source") else ""
            raise BitlowerError(f"the model calls {node.target}{where}, which is no plain operator")
