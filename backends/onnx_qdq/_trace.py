"""The Program traced again for the exporter, without its weights: large tensors become inputs and are put back later.

``torch.onnx`` copies, folds and hashes the tensors of what it translates, which takes several times their size. Here it
sees only the names of large ones; :func:`put_back` then gives the finished graph the Program's own storage.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx
from torch.export import ExportedProgram

from bitlower.ir import BitlowerError, Program, get_tensor, ops

LARGE = 256
"""Tensors of more entries are kept from the exporter."""
_SIZES = (2, 10, 6, 14, 22)
"""Sizes that dimensions are traced with: even, different, and neither 0 nor 1, which torch would bake in."""
_SUM = " + "


@torch.library.custom_op("bitlower_onnx::quantize", mutates_args=())
def _named_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: str,
    name: str,
) -> torch.Tensor:
    """``bitlower::quantize`` with the name of its node in the Program, which a new trace would lose."""
    codes: torch.Tensor = ops.quantize(x, scale, zero_point, quant_min, quant_max, dtype)
    return codes


@_named_quantize.register_fake
def _(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: str,
    name: str,
) -> torch.Tensor:
    return torch.empty_like(x, dtype=ops.DTYPES[dtype])


named_quantize = torch.ops.bitlower_onnx.quantize.default


@dataclass(frozen=True)
class Traced:
    """A Program as ``torch.export`` gives it again.

    Args:
        exported: takes the Program's inputs and then one input for each large tensor.
        lifted: the names of those tensors, in order.
    """

    exported: ExportedProgram
    lifted: tuple[str, ...]


def trace(program: Program) -> Traced:
    """Trace the graph ``model`` with dynamic dimensions and without large tensors.

    Raises:
        BitlowerError: torch cannot trace it.
    """
    named = program.clone()
    for node in named.graph.find_nodes(op="call_function", target=ops.quantize):
        node.args = (*node.args, node.name)
        node.target = named_quantize
    tensors = _lift(named)
    named.recompile()
    sizes = _trace_sizes(program)
    inputs = [
        torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.type.shape], dtype=spec.type.dtype)
        for spec in program.inputs
    ]
    inputs += [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors.values()]
    dynamic: list[dict[int, object]] = [
        {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(spec.type.shape) if isinstance(d, str)}
        for spec in program.inputs
    ]
    dynamic += [{} for _ in tensors]
    names = [str(node.target) for node in named.graph.find_nodes(op="placeholder")]
    shapes = dict(zip(names, dynamic, strict=True))
    with quiet(), torch.no_grad(), explain(program, "traced again"):
        exported = torch.export.export(named.module, tuple(inputs), dynamic_shapes=shapes, strict=False)
    return Traced(exported, tuple(tensors))


def put_back(graph: ir.Graph, program: Program, traced: Traced) -> None:
    """Turn the inputs that stand for tensors into initializers that read the Program's storage.

    Raises:
        BitlowerError: the graph has another number of inputs.
    """
    count = len(program.inputs)
    values = list(graph.inputs)[count:]
    if len(values) != len(traced.lifted):
        raise BitlowerError(f"the ONNX graph has {len(values) + count} inputs, {count + len(traced.lifted)} expected")
    del graph.inputs[count:]
    for value, name in zip(values, traced.lifted, strict=True):
        value.name = name
        value.const_value = TorchTensor(get_tensor(program.module, name).detach(), name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        if value.uses():
            graph.register_initializer(value)


def _lift(program: Program) -> dict[str, torch.Tensor]:
    """Let placeholders stand for all large tensors; those by name, in the order of the placeholders."""
    graph, tensors = program.graph, {}
    inputs: dict[str, fx.Node] = {}
    last, *others = graph.find_nodes(op="placeholder")
    if last is not (first := next(iter(graph.nodes))):
        first.prepend(last)
    for placeholder in others:
        last.append(placeholder)
        last = placeholder
    for node in list(graph.find_nodes(op="get_attr")):
        name = str(node.target)
        tensor = get_tensor(program.module, name)
        if tensor.numel() <= LARGE:
            continue
        if name not in tensors:
            tensors[name] = tensor
            with graph.inserting_after(last):
                last = inputs[name] = graph.placeholder(f"lifted_{len(tensors)}")
            last.meta = dict(node.meta)
        node.replace_all_uses_with(inputs[name])
        graph.erase_node(node)
    return tensors


def _trace_sizes(program: Program) -> dict[str, int]:
    """A size for each symbolic dimension; a sum (``past + sequence``) has the sum of its parts' sizes."""
    dims = {d for spec in program.inputs for d in spec.type.shape if isinstance(d, str)}
    terms = sorted({term for d in dims for term in d.split(_SUM)})
    sizes = {name: _SIZES[i] if i < len(_SIZES) else 22 + 8 * i for i, name in enumerate(terms)}
    return sizes | {d: sum(sizes[term] for term in d.split(_SUM)) for d in dims}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress notes and warnings out of our output."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def explain(program: Program, verb: str) -> Iterator[None]:
    """Turn what torch raises into one error with the innermost reason."""
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = next((line.strip() for line in str(root).splitlines() if line.strip()), type(root).__name__)
        raise BitlowerError(f"{program.source or 'the model'} cannot be {verb}: {reason}") from error
