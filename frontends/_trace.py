"""From ``torch.export``'s ExportedProgram to a Program: names, types, module paths and source lines; no guards."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from bitlower.ir import BitlowerError, CheckError, Level, Program, TensorType, ValueSpec, copy_module, get_tensor
from bitlower.ir.observe import run
from bitlower.ir.storage import release

_DIM_NAMES = ("batch", "sequence")
_PYTHON_ROOTS = tuple(str(Path(p).resolve()) for p in torch.__path__)
_REPLAY_TOLERANCE = 1e-4


def to_program(
    exported: ExportedProgram,
    *,
    task: str,
    inputs: Mapping[str, Sequence[int | str]] | None = None,
    outputs: Sequence[str] | None = None,
) -> Program:
    """The traced graph as a Program at level ``float``; dropout, asserts, guards and writes in place removed.

    Args:
        exported: what ``torch.export`` made.
        task: what the model is for.
        inputs: names of the inputs and of their dimensions, in order; the graph's own and ``batch, sequence`` if None.
        outputs: names of the outputs; as the model calls them if None.

    Raises:
        BitlowerError: the graph calls something that is no operator.
    """
    if any(_writes(node) for node in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about itself
            exported = exported.run_decompositions({})
    module = exported.module(check_guards=False)
    graph = module.graph
    symbols = _symbol_names(graph, list(inputs.values()) if inputs is not None else None)
    for node in list(graph.nodes):
        if _is_noise(node):
            if node.users:
                node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        else:
            node.meta = _translate_meta(node, symbols)
    _reject_foreign(graph)
    _type_tensors(module)
    flat, _ = torch.utils._pytree.tree_flatten(graph.output_node().args[0])
    graph.output_node().args = (tuple(flat),)
    graph.set_codegen(fx.graph.CodeGen())
    specs = _name_inputs(graph, list(inputs) if inputs is not None else None)
    program = Program(
        {"model": copy_module(module)},
        Level.FLOAT,
        task,
        specs,
        tuple(
            ValueSpec(name, node.meta["type"])
            for name, node in zip(outputs or _output_names(exported), flat, strict=True)
        ),
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
def releasing(model: torch.nn.Module) -> Iterator[None]:
    """Give back the memory of each module's mapped parameters when it has run."""

    def release_parameters(module: torch.nn.Module, *results: object) -> None:
        for parameter in module.parameters(recurse=False):
            release(parameter)

    handles = [module.register_forward_hook(release_parameters) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def check_replay(
    program: Program, expected: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], model: str
) -> None:
    """Run the trace on inputs of another shape and compare it with what the model gives for them.

    Raises:
        CheckError: an output differs by more than 1e-4 of its own spread: the trace has a shape baked in.
    """
    for name, value in run(program, inputs).items():
        reference = expected[name]
        spread = float(reference.std()) if reference.numel() > 1 else 1.0
        same = value.shape == reference.shape
        if not same or (
            value.numel() and not float((value - reference).abs().max()) <= _REPLAY_TOLERANCE * max(spread, 1e-6)
        ):
            shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(inputs.items())[:2])
            raise CheckError(f"the trace of {model} gives another {name!r} for {shapes}")


def _writes(node: fx.Node) -> bool:
    """Whether ``node`` changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_noise(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op == "call_module":
        return name == "_guards_fn"
    kinds = ("aten.dropout.default", "aten._assert", "aten.sym_constrain_range", "aten.detach.", "aten.lift_fresh")
    return node.op == "call_function" and name.startswith(kinds)


def _symbol_names(graph: fx.Graph, dims: Sequence[Sequence[int | str]] | None) -> dict[str, str]:
    """Torch's symbols by name: ``dims`` says the names of each input's dimensions; else that where they come first."""
    names: dict[str, str] = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            if dims is not None:
                names.setdefault(str(size), str(dims[index][axis]))
                continue
            fallback = f"{node.target}_{axis}"
            name = _DIM_NAMES[axis] if axis < len(_DIM_NAMES) else fallback
            names.setdefault(str(size), fallback if name in names.values() else name)
    return names


def _type_tensors(module: fx.GraphModule) -> None:
    """Type parameters and buffers, and let all readers of a tied one read it by one name."""
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in list(module.graph.find_nodes(op="get_attr", sort=True)):
        tensor = get_tensor(module, str(node.target))
        node.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))
        place = tensor.untyped_storage()._cdata, tensor.storage_offset()
        key = (*place, tensor.dtype, tensor.shape, tensor.stride())
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)


def _name_inputs(graph: fx.Graph, names: Sequence[str] | None) -> tuple[ValueSpec, ...]:
    """The inputs; ``names`` replace the placeholders' own."""
    nodes = list(graph.find_nodes(op="placeholder"))
    for node, name in zip(nodes, names or (), strict=names is not None):
        node.target = node.name = name.replace(".", "_")
    return tuple(
        ValueSpec(name, node.meta["type"])
        for name, node in zip(names or [str(n.target) for n in nodes], nodes, strict=True)
    )


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
    terms = text.split(" + ")
    if set(terms) <= set(symbols.values()):
        text = " + ".join(sorted(terms))
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
