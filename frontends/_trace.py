"""From ``torch.export``'s ExportedProgram to a Program: names, types, module paths and source lines; no guards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from bitlower.frontends._dimensions import Layout, found_lengths, named, symbol_names
from bitlower.frontends._failure import PYTHON_ROOTS
from bitlower.ir import BitlowerError, CheckError, Level, Program, TensorType, ValueSpec, copy_module, get_tensor
from bitlower.ir.dataflow import ancestors
from bitlower.ir.observe import run
from bitlower.ir.operators import AttentionNode, argument, set_graph_results
from bitlower.ir.storage import release

_REPLAY_TOLERANCE = 1e-4
"""Of the spread of an output: what float32 sums in another order may differ by."""


def to_program(
    exported: ExportedProgram,
    *,
    task: str,
    inputs: Layout | None = None,
    outputs: Sequence[str] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> Program:
    """The traced graph as a Program at level ``float``; dropout, asserts, guards and writes in place removed.

    Args:
        exported: what ``torch.export`` made.
        task: what the model is for.
        inputs: names of the inputs and of their dimensions, in order; the graph's own, and as torch finds sizes equal,
            if None.
        outputs: names of the outputs; as the model calls them if None.
        keep: which of the outputs the program has, by name.

    Raises:
        BitlowerError: the graph calls something that is no operator, a dimension that should vary is fixed, or an
            output is no tensor.
    """
    if any(_writes(node) for node in exported.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about itself
            exported = exported.run_decompositions({})
    module = exported.module(check_guards=False)
    graph = module.graph
    symbols = symbol_names(graph, inputs)
    for node in list(graph.nodes):
        if _is_noise(node):
            if node.users:
                node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        else:
            node.meta = _translate_meta(node, symbols)
    _reject_foreign(graph)
    type_tensors(module)
    _drop_empty_parts(graph)
    _reshape_learned_attention(module)
    results = _name_outputs(graph, outputs or _output_names(exported), keep)
    graph.set_codegen(fx.graph.CodeGen())
    specs = _name_inputs(graph, list(inputs) if inputs is not None else None)
    program = Program(
        {"model": copy_module(module)},
        Level.FLOAT,
        task,
        specs,
        results,
        lengths=found_lengths(exported, symbols),
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
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Undo what a run changes in ``model``: attributes, buffers and modules that it replaces, not tensors it writes to.

    Some models choose how to compute by the first text that they see, and keep to it.
    """
    parts = ("_parameters", "_buffers", "_modules")
    before = [
        (module, dict(vars(module)), {part: dict(getattr(module, part)) for part in parts})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, members in before:
            vars(module).clear()
            vars(module).update(attributes)
            for part, values in members.items():
                table = getattr(module, part)
                table.clear()
                table.update(values)


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


def check_replay(
    program: Program, expected: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], model: str
) -> None:
    """Run the trace on inputs of another shape and compare it with what the model returns for them.

    Raises:
        CheckError: an output differs by more than 1e-4 of its own spread: the trace has a shape baked in.
    """
    for name, value in _replayed(program, inputs, model).items():
        reference = expected[name]
        spread = float(reference.std()) if reference.numel() > 1 else 1.0
        same = value.shape == reference.shape
        if not same or (
            value.numel() and not float((value - reference).abs().max()) <= _REPLAY_TOLERANCE * max(spread, 1e-6)
        ):
            raise CheckError(f"the trace of {model} gives another {name!r} for {_shapes(inputs)}")


def _replayed(program: Program, inputs: Mapping[str, torch.Tensor], model: str) -> dict[str, torch.Tensor]:
    try:
        return run(program, inputs)
    except BitlowerError:
        raise
    except Exception as error:  # whatever torch raises where sizes do not go together
        reason = str(error).splitlines()[0]
        raise CheckError(f"the trace of {model} does not run for {_shapes(inputs)}: {reason}") from error


def _shapes(inputs: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in list(inputs.items())[:2])


def _writes(node: fx.Node) -> bool:
    """Whether ``node`` changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_noise(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op == "call_module":
        return name == "_guards_fn"
    kinds = ("aten.dropout.default", "aten._assert", "aten.sym_constrain_range", "aten.detach.", "aten.lift_fresh")
    return node.op == "call_function" and name.startswith(kinds)


def type_tensors(module: fx.GraphModule) -> None:
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


def _name_outputs(graph: fx.Graph, names: Sequence[str], keep: Callable[[str], bool]) -> tuple[ValueSpec, ...]:
    """The outputs, in one tuple; what is not kept, and None, is dropped."""
    flat, _ = torch.utils._pytree.tree_flatten(graph.output_node().args)
    outputs = {name: value for name, value in zip(names, flat, strict=True) if value is not None and keep(name)}
    for name, value in outputs.items():
        if not isinstance(value, fx.Node) or "type" not in value.meta:
            raise BitlowerError(f"the output {name!r} is no tensor", hint="return tensors alone")
    if not outputs:
        raise BitlowerError("the model returns no tensor")
    set_graph_results(graph, list(outputs.values()))
    return tuple(ValueSpec(name, value.meta["type"]) for name, value in outputs.items())


def _translate_meta(node: fx.Node, symbols: Mapping[str, str]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        meta["type"] = TensorType(value.dtype, tuple(named(size, symbols) for size in value.shape))
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0].removeprefix("L['self'].") if stack else ""
    if path and not path.startswith("_"):
        meta["path"] = path
    source = _source_line(node.meta.get("stack_trace") or "")
    if source:
        meta["source"] = source
    return meta


def _source_line(stack_trace: str) -> str:
    """``file.py:line: code`` of the innermost frame outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    for path, line, code in reversed(frames):
        if not str(Path(path).resolve()).startswith(PYTHON_ROOTS):
            return f"{Path(path).name}:{line}: {code.strip()}"
    return ""


def _output_names(exported: ExportedProgram) -> list[str]:
    """The outputs as the model calls them: by their keys, else by their places; what lies deeper by both."""
    spec = exported.call_spec.out_spec
    if spec is None or spec.is_leaf():
        return ["output"]
    return [name.removeprefix("_") if name[1:2].isalpha() else f"output{name}" for name in _leaf_names(spec, "")]


def _leaf_names(spec: Any, path: str) -> Iterator[str]:
    if spec.is_leaf():
        yield path
        return
    keys = spec.context if isinstance(spec.context, list) and all(isinstance(k, str) for k in spec.context) else None
    children = spec.children()
    named = keys is not None and len(keys) == len(children)
    for key, child in zip(keys if named and keys else range(len(children)), children, strict=True):
        yield from _leaf_names(child, f"{path}_{key}")


def _drop_empty_parts(graph: fx.Graph) -> None:
    """Take out what joins nothing to a value: a cache that begins without a size of its own, ``[0]``."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = argument(node, "tensors")
        filled = [part for part in parts if part.meta["type"].shape != (0,)]
        if len(filled) == 1 < len(parts):
            node.replace_all_uses_with(filled[0])
            graph.erase_node(node)


def _reshape_learned_attention(module: fx.GraphModule) -> None:
    """Let what comes out of an attention with a learned bias be copied into shape where it lies otherwise.

    Torch lays the result out in one way while it is traced and in another where the bias has a gradient.
    """
    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = AttentionNode(node).mask
        read = ancestors(module.graph, [mask]) if mask is not None else ()
        tensors = [get_tensor(module, str(part.target)) for part in read if part.op == "get_attr"]
        if not any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors):
            continue
        views = [node]
        for value in views:
            views += [user for user in value.users if user.target in (aten.view.default, aten.transpose.int)]
        for value in views:
            if value.target is aten.view.default:
                value.target = aten.reshape.default


def _reject_foreign(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            where = f" at {node.meta['source']}" if node.meta.get("source") else ""
            raise BitlowerError(f"the model calls {node.target}{where}, which is no plain operator")
