"""Checks of a Program that hold between any two passes: the graph, its types, its level, its quantizers, its tensors.

Each check is a function of one graph or one node that raises :class:`CheckError` for the first thing that is wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.dataflow import QUANTIZER, VIEWS
from bitlower.ir.diagnostics import BitlowerError, CheckError, nearest
from bitlower.ir.fit import ValueSpec
from bitlower.ir.kernels import KERNELS, is_kernel, output_of
from bitlower.ir.program import Program
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES, WEIGHT_ROLES
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.quantizer_node import is_uncalibrated
from bitlower.ir.storage import parts
from bitlower.ir.tensors import get_tensor
from bitlower.ir.types import Level, TensorType
from bitlower.ir.verifier.kernels import check_kernel, check_source
from bitlower.ir.verifier.scales import check_layout, check_range, check_stored_codes, fail, identity, type_of

_PYTHON_MODULES = ("_operator", "math", "torch")
_ROUNDING = (ops.fake_quantize, ops.quantize)
_FORBIDDEN = {
    Level.FLOAT: KERNELS | {ops.fake_quantize, ops.choose_qparams, ops.quantize, ops.dequantize},
    Level.SIMULATED: KERNELS | {ops.quantize, ops.dequantize},
    Level.INTEGER: KERNELS | {ops.fake_quantize},
    Level.FUSED: frozenset({ops.fake_quantize}),
}

GraphCheck = Callable[[Program, fx.GraphModule], None]
NodeCheck = Callable[[Program, fx.GraphModule, fx.Node], None]


def verify(program: Program) -> None:
    """Check every graph of ``program``.

    Raises:
        CheckError: something is wrong; the message names the node, the model's module path and its source line.
    """
    for module in program.graphs.values():
        for graph_check in GRAPH_CHECKS:
            graph_check(program, module)
        for node in module.graph.nodes:
            for check in NODE_CHECKS:
                check(program, module, node)
    check_signature(program)
    check_lengths(program)
    check_finite(program)


def check_names(program: Program, module: fx.GraphModule) -> None:
    """Node names are unique."""
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.name in seen:
            fail(node, "another node has this name")
        seen.add(node.name)


def check_lint(program: Program, module: fx.GraphModule) -> None:
    """The graph is sound as torch.fx sees it: nodes come before their users and belong to this graph."""
    try:
        module.graph.lint()
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise CheckError(f"the graph is not sound: {error}") from error


def check_signature(program: Program) -> None:
    """Placeholders are the inputs in order, with ``_`` for dots; the graph ``model`` gives a value for each output."""
    placeholders = list(program.graph.find_nodes(op="placeholder"))
    names, expected = [str(node.target) for node in placeholders], [spec.name for spec in program.inputs]
    if names != [name.replace(".", "_") for name in expected]:
        raise CheckError(f"the graph takes ({', '.join(names)}), the program says ({', '.join(expected)})")
    results = program.graph.output_node().args[0]
    if not isinstance(results, tuple | list):
        raise CheckError("the graph gives no tuple of outputs")
    if len(results) != len(program.outputs):
        raise CheckError(f"the graph gives {len(results)} values, the program says {len(program.outputs)} outputs")
    for spec, node in zip((*program.inputs, *program.outputs), (*placeholders, *results), strict=True):
        _check_value(spec, node)


def check_lengths(program: Program) -> None:
    """Sizes are told of symbolic dimensions of inputs alone."""
    known = {dim for spec in program.inputs for dim in spec.type.shape if isinstance(dim, str)}
    for name, length in program.lengths.items():
        if name not in known:
            raise CheckError(f"no input has the dimension {name!r}, which is said to be {length}")


def _check_value(spec: ValueSpec, node: object) -> None:
    if not isinstance(node, fx.Node):
        raise CheckError(f"the output {spec.name!r} is {node!r}, not a value of the graph")
    kind = node.meta.get("type")
    if not isinstance(kind, TensorType) or kind.dtype != spec.type.dtype or kind.rank != spec.type.rank:
        fail(node, f"is of type {kind}, the program says {spec}")


def check_kind(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """Only operators of torch's registry and functions on sizes are called."""
    if node.op in ("call_module", "call_method"):
        fail(node, f"a Program holds no {node.op}")
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return
    if getattr(node.target, "__module__", "") not in _PYTHON_MODULES:
        fail(node, "calls a function that is no operator")


def check_attribute(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """A ``get_attr`` node names a tensor, and has its dtype and shape as type if it has one."""
    if node.op != "get_attr":
        return
    try:
        tensor = get_tensor(module, str(node.target))
    except BitlowerError as error:
        fail(node, str(error))
    kind = node.meta.get("type")
    if kind is not None and kind != TensorType(tensor.dtype, tuple(tensor.shape)):
        fail(node, f"is of type {kind}, the tensor is {TensorType(tensor.dtype, tuple(tensor.shape))}")


def check_meta(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """``path`` and ``source`` are text; ``type`` is there for every computed tensor and well-formed."""
    for key in ("path", "source"):
        if not isinstance(node.meta.get(key, ""), str):
            raise CheckError(f"%{node.name}: its meta {key!r} is {node.meta[key]!r}, not text")
    kind = node.meta.get("type")
    if kind is None:
        if node.op == "placeholder" or (node.op == "call_function" and _gives_tensor(node)):
            fail(node, "has no type")
    elif not isinstance(kind, TensorType) or not all(isinstance(d, str) or d >= 0 for d in kind.shape):
        fail(node, f"its type {kind!r} is none")


def _gives_tensor(node: fx.Node) -> bool:
    """Whether ``node`` computes one tensor, as the operator's schema says, or takes one out of several."""
    source, index = node, 0
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        source, index = node.args[0], node.args[1]
    if not isinstance(source.target, torch._ops.OpOverload):
        return False
    returns = source.target._schema.returns
    alone = len(returns) == 1 or source is not node
    return alone and index < len(returns) and isinstance(returns[index].type, torch.TensorType)


def check_level(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """The operators that the program's level does not have are not there."""
    if node.target in _FORBIDDEN[program.level]:
        fail(node, f"does not belong into a program at level {program.level}")


def check_quantizer(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """A quantizer says what it is, and no other node does."""
    quantizer = node.meta.get("quantizer")
    if node.target not in QUANTIZER:
        if quantizer is not None:
            fail(node, "carries a quantizer but is none")
        return
    if not isinstance(quantizer, Quantizer):
        fail(node, "is a quantizer and does not say which")
    roles = (*WEIGHT_ROLES, *ACTIVATION_ROLES)
    if quantizer.role not in roles:
        fail(node, f"has the unknown role {quantizer.role!r}", hint=nearest(quantizer.role, roles))


def check_grid_arguments(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """A rounding node has its grid's smallest and largest code, and ``quantize`` its dtype, as arguments."""
    if node.target not in _ROUNDING:
        return
    grid = _quantizer(node).spec.grid
    if node.args[3:5] != (grid.quant_min, grid.quant_max):
        fail(node, f"clamps to {list(node.args[3:5])}, the grid {grid} is [{grid.quant_min}, {grid.quant_max}]")
    if node.target is ops.quantize and [ops.DTYPES.get(str(name)) for name in node.args[5:]] != [grid.dtype]:
        fail(node, f"gives {list(node.args[5:])}, the grid {grid} is held in {grid.dtype}")


def check_quantizer_type(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """A quantizer has the shape that it takes; only the dtype changes between codes and values."""
    if node.target not in QUANTIZER:
        return
    before, after = type_of(module, _operand(node)), node.meta["type"]
    dtype = before.dtype
    if node.target is ops.quantize:
        dtype = _quantizer(node).spec.grid.dtype
    elif node.target is ops.dequantize:
        dtype = torch.float32
    if after != before.with_dtype(dtype):
        fail(node, f"is of type {after}, its input makes it {before.with_dtype(dtype)}")


def check_scale(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """Scales and zero points are stored in the granularity's shape, or computed from the same value at run time."""
    if node.target not in QUANTIZER:
        return
    quantizer, (scale, zero_point) = _quantizer(node), _parameters(node)
    if quantizer.spec.granularity.dynamic:
        _check_dynamic(node, quantizer, scale, zero_point)
    elif scale.op != "get_attr" or zero_point.op != "get_attr":
        fail(node, f"its scale is %{scale.name}, {quantizer.spec.granularity} scales are stored tensors")
    else:
        stored = get_tensor(module, str(scale.target)), get_tensor(module, str(zero_point.target))
        check_layout(node, quantizer.spec.granularity, type_of(module, _operand(node)), *stored)
        if not is_uncalibrated(node):
            check_range(node, quantizer.spec.grid, *stored)


def _check_dynamic(node: fx.Node, quantizer: Quantizer, scale: fx.Node, zero_point: fx.Node) -> None:
    chooser = scale.args[0] if scale.target is operator.getitem else None
    if not isinstance(chooser, fx.Node) or chooser.target is not ops.choose_qparams:
        fail(node, f"its scale is %{scale.name}, {quantizer.spec.granularity} scales come from choose_qparams")
    if scale.args[1] != 0 or zero_point.target is not operator.getitem or zero_point.args != (chooser, 1):
        fail(node, f"its scale and zero point are not both from %{chooser.name}")
    grid = quantizer.spec.grid
    expected = (grid.bits, grid.signed, grid.symmetric, grid.restricted, str(grid.convention))
    if chooser.args[1:] != expected:
        fail(node, f"%{chooser.name} chooses for {list(chooser.args[1:])}, the grid {grid} is {list(expected)}")
    rounded = _operand(_operand(node) if node.target is ops.dequantize else node)
    if _operand(chooser) is not rounded:
        fail(node, f"rounds %{rounded.name} with a scale chosen for %{_operand(chooser).name}")


def check_series(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """No value is rounded twice in a row."""
    if node.target not in _ROUNDING:
        return
    source = _operand(node)
    while source.target in VIEWS:
        source = source.all_input_nodes[0]
    if source.target in QUANTIZER:
        fail(node, f"rounds a value that %{source.name} has rounded already")


def check_quantize(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """Codes of ``quantize`` are read by ``dequantize`` alone, with the same range and spec, and by kernels."""
    if node.target is not ops.quantize:
        return
    for user in node.users:
        if program.level is Level.FUSED and (user.target in VIEWS or is_kernel(user)):
            continue  # the kernel is checked where it reads them
        if user.target is not ops.dequantize:
            fail(user, f"reads the codes of %{node.name}; only dequantize may")
        if [identity(n) for n in _parameters(user)] != [identity(n) for n in _parameters(node)]:
            fail(user, f"has another scale or zero point than %{node.name}")
        if _quantizer(user) != _quantizer(node):
            fail(user, f"is {_quantizer(user)}, but %{node.name} is {_quantizer(node)}")


def check_codes(program: Program, module: fx.GraphModule, node: fx.Node) -> None:
    """``dequantize`` reads ``quantize``, a kernel's codes, or stored ones of the grid's dtype, inside the grid."""
    if node.target is not ops.dequantize:
        return
    source, grid = _operand(node), _quantizer(node).spec.grid
    if source.op != "get_attr":
        if output_of(source) is not None:
            check_source(module, node, "codes", (source, *_parameters(node)))
        elif source.target is not ops.quantize:
            fail(node, f"reads %{source.name}, which holds no codes")
        return
    check_stored_codes(module, node, source, grid)


def check_finite(program: Program) -> None:
    """No parameter holds NaN or Inf, no other tensor NaN; masks may hold Inf."""
    for name, tensor in program.tensors():
        if not tensor.is_floating_point() or _is_finite(tensor):
            continue
        if isinstance(tensor, torch.nn.Parameter) or bool(torch.isnan(tensor).any()):
            raise CheckError(f"the tensor {name.partition('/')[2]!r} holds NaN or Inf")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; a finite sum of squares says so much faster than a look at each of them."""
    return all(bool(torch.isfinite(torch.dot(p, p))) or bool(torch.isfinite(p).all()) for p in parts(tensor))


GRAPH_CHECKS: tuple[GraphCheck, ...] = (check_names, check_lint)
NODE_CHECKS: tuple[NodeCheck, ...] = (
    check_kind,
    check_attribute,
    check_meta,
    check_level,
    check_quantizer,
    check_grid_arguments,
    check_quantizer_type,
    check_scale,
    check_series,
    check_quantize,
    check_codes,
    check_kernel,
)


def _quantizer(node: fx.Node) -> Quantizer:
    quantizer = node.meta.get("quantizer")
    if not isinstance(quantizer, Quantizer):
        fail(node, "is a quantizer and does not say which")
    return quantizer


def _operand(node: fx.Node) -> fx.Node:
    """The first argument of a bitlower operator: the value or the codes."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        fail(node, f"its first argument is {operand!r}, not a value")
    return operand


def _parameters(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The scale and the zero point of a quantizer."""
    if len(node.args) < 3 or not isinstance(node.args[1], fx.Node) or not isinstance(node.args[2], fx.Node):
        fail(node, "its scale and zero point are not values of the graph")
    return node.args[1], node.args[2]
