"""Bring a residual stream into another basis: norms lose their weights to linears, then every matrix is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import fx

from bitlower.ir import TensorType, get_tensor, set_tensor
from bitlower.ir.dataflow import ADD
from bitlower.ir.operators import BinaryNode, EmbeddingNode, LinearNode, NormNode, argument
from bitlower.ir.storage import like, release
from bitlower.passes.outliers._residual_stream import LINEAR, Stream, refuse

aten = torch.ops.aten
_CHUNK = 1 << 22
"""Entries that are float64 at a time: 32 MB beside the weight."""


def add_products(module: fx.GraphModule, stream: Stream) -> int:
    """Give out what the graph gives out of the stream through a linear layer, which is none so far; say how many."""
    output = module.graph.output_node()
    for node, norm in stream.ends:
        width = stream.domain.size
        name = _free_name(module, f"rotations.{node.name}.weight")
        set_tensor(module, name, torch.nn.Parameter(torch.eye(width)))
        with module.graph.inserting_before(output):
            weight = _get(module, name)
            product = module.graph.call_function(LINEAR, (node, weight))
        product.meta = {key: node.meta[key] for key in ("type", "path") if key in node.meta}
        output.replace_input_with(node, product)
        (stream.readers if norm is None else stream.norms[norm]).append(product)
    return len(stream.ends)


def fold_norms(module: fx.GraphModule, stream: Stream) -> tuple[list[str], list[str]]:
    """Move γ and β of the stream's norms into the linears that read them: ``W(γ·x + β) + b = (Wγ)x + (Wβ + b)``.

    A norm whose γ is one number for all channels, without β, commutes with every rotation and keeps it.

    Returns:
        The norms by module path, and the weights that are no longer tied because of it.
    """
    folded, untied = [], []
    values = {norm: (_gamma(module, norm, stream.domain.size), _beta(module, norm)) for norm in stream.norms}
    for norm, (gamma, beta) in values.items():
        if beta is None and bool((gamma == gamma[0]).all()):
            continue
        for linear in stream.norms[norm]:
            untied += _own(module, linear, "weight")
            if beta is not None:
                _add_to_bias(module, linear, _weight(module, linear).double() @ beta)
            _along(module, _weight_name(linear), 1, gamma.mul)
        _reset(module, norm)
        folded.append(str(norm.meta.get("path", norm.name)))
    return folded, untied


def centre(module: fx.GraphModule, stream: Stream) -> bool:
    """Make every LayerNorm of the stream an RMSNorm: all that writes the stream leaves its mean out (SliceGPT, §3.1).

    Returns:
        Whether there were any.

    Raises:
        BitlowerError: something reads the stream itself, and would miss the mean.
    """
    layer_norms = [norm for norm in stream.norms if norm.target is not aten.rms_norm.default]
    if not layer_norms:
        return False
    for node in (*stream.readers, *(norm for norm in stream.norms if norm not in layer_norms)):
        refuse(node, "it reads the stream with its mean, which the layer norms beside it do not need")
    for name, axis in _stored(stream, writing=True):
        _along(module, name, axis, lambda rows: rows - rows.mean(-1, keepdim=True))
    for norm in layer_norms:
        view, shape = NormNode(norm), argument(norm, "normalized_shape")
        norm.target, norm.args = aten.rms_norm.default, (view.x, shape, view.weight, view.epsilon)
    return True


def rotate(module: fx.GraphModule, stream: Stream, basis: torch.Tensor) -> None:
    """Let the stream hold ``x · basis`` in place of x; ``basis`` is orthogonal, float64 ``[channels, channels]``."""
    for name, axis in {**dict.fromkeys(_stored(stream, writing=True)), **dict.fromkeys(_stored(stream, writing=False))}:
        _along(module, name, axis, lambda rows: rows @ basis)


def _stored(stream: Stream, *, writing: bool) -> Iterator[tuple[str, int]]:
    """The parameters along the stream, each with the axis of its channels: those that write it, or that read it."""
    if not writing:
        for linear in (*stream.readers, *(linear for linears in stream.norms.values() for linear in linears)):
            yield _weight_name(linear), 1
        return
    for table in stream.tables:
        yield str(EmbeddingNode(table).table.target), 1
    for linear in stream.writers:
        yield _weight_name(linear), 0
        if LinearNode(linear).bias is not None:
            yield str(LinearNode(linear).stored_bias), 0
    for vector in stream.vectors:
        yield str(vector.target), -1


def _along(module: fx.GraphModule, name: str, axis: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply ``function``, from float64 rows ``[n, channels]`` to the same, along an axis of a parameter."""
    old = get_tensor(module, name).detach()
    turned = old.movedim(axis, -1)
    rows = turned.reshape(-1, turned.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    new = torch.cat([function(part.double()).to(old.dtype) for part in torch.split(rows, step)])
    _set(module, name, new.reshape(turned.shape).movedim(-1, axis).contiguous())
    release(old)


def _set(module: fx.GraphModule, name: str, new: torch.Tensor) -> None:
    set_tensor(module, name, torch.nn.Parameter(like(new, get_tensor(module, name))))


def _gamma(module: fx.GraphModule, norm: fx.Node, width: int) -> torch.Tensor:
    """What the norm multiplies with, float64 ``[channels]``: a parameter, or that and a number (Gemma's 1 + w)."""
    weight = NormNode(norm).weight
    if weight is None:
        return torch.ones(width, dtype=torch.float64)
    if weight.op == "get_attr":
        return get_tensor(module, str(weight.target)).detach().double()
    shift = _shift(weight)
    if shift is None:
        refuse(norm, "its weight is computed")
    return get_tensor(module, str(BinaryNode(weight).left.target)).detach().double() + shift


def _shift(weight: fx.Node) -> float | None:
    """The number that is added to a parameter to make ``weight``; None if it is made otherwise."""
    if weight.target not in ADD or BinaryNode(weight).left.op != "get_attr":
        return None
    number = BinaryNode(weight).right
    return float(number) if isinstance(number, int | float) else None


def _beta(module: fx.GraphModule, norm: fx.Node) -> torch.Tensor | None:
    """What the norm adds, float64 ``[channels]``; None if that is nothing."""
    shift = NormNode(norm).bias
    if shift is None:
        return None
    if shift.op != "get_attr":
        refuse(norm, "its bias is computed")
    beta = get_tensor(module, str(shift.target)).detach().double()
    return beta if bool(beta.any()) else None


def _reset(module: fx.GraphModule, norm: fx.Node) -> None:
    """Let the norm multiply with 1; a parameter of an RMSNorm stays where it is, so that the model keeps its form."""
    view = NormNode(norm)
    weight = view.weight
    if not view.is_rms:
        view.set("weight", None)
        view.set("bias", None)
        return
    if weight is None:
        return
    shift = _shift(weight)
    parameter = weight if shift is None else BinaryNode(weight).left
    if len(weight.users) == len(parameter.users) == 1:
        _along(module, str(parameter.target), -1, lambda rows: torch.full_like(rows, 1 - (shift or 0.0)))
    else:
        view.set("weight", None)


def _weight(module: fx.GraphModule, linear: fx.Node) -> torch.Tensor:
    return get_tensor(module, _weight_name(linear)).detach()


def _weight_name(linear: fx.Node) -> str:
    return str(LinearNode(linear).weight.target)


def _add_to_bias(module: fx.GraphModule, linear: fx.Node, shift: torch.Tensor) -> None:
    """Add ``shift``, float64 ``[outputs]``, to the bias of a linear, which gets one if it has none."""
    if LinearNode(linear).bias is None:
        name = _free_name(module, f"{_weight_name(linear).removesuffix('.weight')}.bias")
        set_tensor(module, name, torch.nn.Parameter(shift.to(_weight(module, linear).dtype)))
        with linear.graph.inserting_before(linear):
            LinearNode(linear).set("bias", _get(module, name))
        return
    _own(module, linear, "bias")
    _along(module, str(LinearNode(linear).stored_bias), -1, shift.add)


def _own(module: fx.GraphModule, linear: fx.Node, which: str) -> list[str]:
    """Give the linear a weight or bias that nobody else reads; the name of the new one, if it has to be."""
    node = LinearNode(linear).operand(which)
    if len(node.users) == 1:
        return []
    leaf = str(node.target).rpartition(".")[2]
    name = _free_name(module, f"{linear.meta.get('path') or linear.name}.{leaf}")
    set_tensor(module, name, get_tensor(module, str(node.target)))
    with linear.graph.inserting_before(linear):
        LinearNode(linear).set(which, _get(module, name))
    return [name]


def _get(module: fx.GraphModule, name: str) -> fx.Node:
    """A node for a stored tensor, at the insertion point."""
    node = module.graph.get_attr(name)
    tensor = get_tensor(module, name)
    node.meta = {"type": TensorType(tensor.dtype, tuple(tensor.shape))}
    return node


def _free_name(module: fx.GraphModule, name: str) -> str:
    """``name``, with a number if the graph reads something of that name."""
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return next(free for i in count() if (free := f"{name}_{i}" if i else name) not in names)
