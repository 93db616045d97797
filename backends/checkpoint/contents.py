"""What a Program puts into a checkpoint: its quantized weights, and the rest in float, under Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from bitlower.backends.checkpoint.skeleton import CONV1D, LINEAR, NORMED, Skeleton
from bitlower.ir import BitlowerError, Program, QuantSpec, ScaleConvention, get_tensor, ops, packing
from bitlower.ir.operators import LinearNode, operand
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.storage import release

SHARED = "no client ties quantized weights"
_LINEAR, _EMBEDDING = torch.ops.aten.linear.default, torch.ops.aten.embedding.default


@dataclass(frozen=True)
class Layer:
    """A quantized weight of a linear layer or an embedding.

    Args:
        path: of the module that holds it.
        kind: of that module, see :class:`Skeleton`.
        role: of its quantizer.
        spec: its grid and granularity.
        node: its ``dequantize`` node.
        module: holds the tensors.
        piece: which of how many equal parts of the rows.
    """

    path: str
    kind: str
    role: str
    spec: QuantSpec
    node: fx.Node
    module: fx.GraphModule
    piece: tuple[int, int] = (0, 1)

    def _part(self, name: str) -> torch.Tensor:
        tensor = get_tensor(self.module, str(operand(self.node, name).target)).detach()
        index, count = self.piece
        return tensor.chunk(count)[index] if count > 1 and tensor.dim() and len(tensor) > 1 else tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; entries and width of an embedding."""
        rows, columns = self._part("code").shape
        return rows, columns

    @property
    def groups(self) -> int:
        """How many scales a row has."""
        scale = self._part("scale")
        return scale.shape[1] if scale.dim() == 2 else 1

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 if the whole row does because the granularity has no groups."""
        return self.shape[1] // self.groups if self.spec.granularity.kind == "group" else -1

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.spec.grid.bits

    @property
    def symmetric(self) -> bool:
        """See :func:`is_symmetric`."""
        return is_symmetric(self.spec)

    def codes(self) -> torch.Tensor:
        """Unsigned, uint8 [rows, columns]."""
        return packing.unsigned(self._part("code"), self.bits)

    def scales(self) -> torch.Tensor:
        """One for each row and group, float32 [rows, groups]."""
        return self._spread(self._part("scale")).float()

    def zeros(self) -> torch.Tensor:
        """The zero points of the unsigned codes, uint8 [rows, groups]."""
        offset = 1 << (self.bits - 1) if self.spec.grid.signed else 0
        return (self._spread(self._part("zero_point")) + offset).to(torch.uint8)

    def release(self) -> None:
        """Let go of the codes if they lie in a file."""
        release(self._part("code"))

    def _spread(self, part: torch.Tensor) -> torch.Tensor:
        """One entry for each row and group, of a tensor laid out as the granularity says."""
        part = part.reshape(1, 1) if part.dim() == 0 else part
        return part.repeat_interleave(self.shape[0] // part.shape[0], 0)


@dataclass(frozen=True)
class Float:
    """A parameter that stays in float.

    Args:
        name: in the checkpoint.
        target: in the Program.
        transposed: the Program holds it the other way round than the model.
        module: holds the tensor.
        kernel: the sizes of a convolution's kernel that the Program holds as a matrix ``[out, in · sizes]``.
        lengths: the axes along which a model has lengths of its weight's slices beside their directions (weight
            normalization), of which this entry is the former; a weight is a direction as it is.
    """

    name: str
    target: str
    transposed: bool
    module: fx.GraphModule
    kernel: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def value(self) -> torch.Tensor:
        """In the model's orientation and shape."""
        tensor = get_tensor(self.module, self.target).detach()
        if self.lengths:
            across = tuple(axis for axis in range(tensor.dim()) if axis not in self.lengths)
            length: torch.Tensor = torch.linalg.vector_norm(tensor, dim=across, keepdim=True)
            return length
        if self.kernel:
            return tensor.reshape(len(tensor), -1, *self.kernel)
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Contents:
    """Everything that goes into the files.

    Args:
        layers: the quantized weights, in execution order.
        floats: the others, in execution order.
        ties: names that have no tensor of their own, each with the one that they share; fewer than the model's where
            the Program holds two tensors, one of them quantized for example.
    """

    layers: tuple[Layer, ...]
    floats: tuple[Float, ...]
    ties: Mapping[str, str]


def is_symmetric(spec: QuantSpec) -> bool:
    """Whether every zero point is the middle of the unsigned codes, so that formats need not store it."""
    return spec.grid.symmetric and (spec.grid.signed or spec.grid.convention is ScaleConvention.OFFSET)


def collect(program: Program, skeleton: Skeleton) -> Contents:
    """The contents of the checkpoint of ``program``.

    Raises:
        BitlowerError: activations or norms are quantized, a weight is not of the model or lacks, or has another shape,
            or a quantized weight is shared by several layers.
    """
    _check_graphs(program)
    whole = tuple(_layers(program, skeleton))
    packed = {f"{layer.path}.weight" for layer in whole}
    weights = dict(_float_weights(program, skeleton))
    floats: dict[str, Float] = {}
    ties = dict(skeleton.ties)
    for target, node in weights.items():
        source = skeleton.ties.get(target, target)
        tied = {source, *(name for name, first in skeleton.ties.items() if first == source)}
        names = [source]
        if tied & packed or len(tied & set(weights)) > 1:
            names = sorted({f"{path}.weight" for path in readers(node)} & tied - packed) or [target]
            ties = {name: first for name, first in ties.items() if first != source}
        floats |= {name: _float(name, node, program.module, skeleton) for name in names}
    for name in skeleton.shapes:
        if not {name, ties.get(name)} & (packed | set(floats)):
            raise BitlowerError(f"the program has no weight {name}, which {skeleton.architecture} needs")
    check_experts(skeleton, {layer.path for layer in whole})
    layers = tuple(piece for layer in whole for piece in _pieces(layer, skeleton))
    return Contents(layers, tuple(floats.values()), ties)


def _pieces(layer: Layer, skeleton: Skeleton) -> Iterator[Layer]:
    """The layers that checkpoints hold ``layer`` in."""
    paths = skeleton.pieces.get(layer.path, [layer.path])
    for index, path in enumerate(paths):
        yield replace(layer, path=path, piece=(index, len(paths)))


def check_experts(skeleton: Skeleton, packed: set[str] | None = None) -> None:
    """See that a checkpoint can hold the experts of a mixture.

    Args:
        skeleton: its model.
        packed: the paths of all packed layers; None: not known yet.

    Raises:
        BitlowerError: it cannot; the first expert is named, and the reason.
    """
    for path in skeleton.experts:
        if path not in skeleton.pieces:
            reason = f"{skeleton.architecture} holds its experts in one tensor, also in files"
        elif packed is not None and path not in packed:
            reason = "transformers reads experts that are all packed, and this one is float"
        else:
            continue
        raise BitlowerError(f"a checkpoint cannot hold {path}: {reason}", hint="export with the backend `onnx-qdq`")


def _check_graphs(program: Program) -> None:
    if set(program.graphs) != {"model"}:
        raise BitlowerError(f"this backend exports one graph, the program has {', '.join(program.graphs)}")


def _layers(program: Program, skeleton: Skeleton) -> Iterator[Layer]:
    for node, quantizer in program.quantizers():
        path = str(node.meta.get("path", ""))
        where = f"{quantizer.tensor} ({quantizer.role}{f' of {path}' if path else ''})"
        if node.target is not ops.dequantize or not QuantizerNode(node).rounds_parameter:
            raise BitlowerError(
                f"{where} is quantized when the model runs, and a checkpoint holds weights only",
                hint="use a weight-only scheme such as W4A16-g128, or the backend `onnx-qdq`",
            )
        if quantizer.role not in ("linear-weight", "embedding-table"):
            raise BitlowerError(f"{where}: checkpoint formats hold linear layers and embedding tables in few bits")
        names = readers(node)
        if len(names) > 1:
            raise BitlowerError(
                f"{where} is shared by {', '.join(names)}, and {SHARED}",
                hint="leave it in float: `ignore` these layers",
            )
        path = next(iter(names), path)
        layer = Layer(path, skeleton.kinds.get(path, ""), quantizer.role, quantizer.spec, node, program.module)
        _check_layer(layer, where, skeleton)
        yield layer


def readers(node: fx.Node) -> list[str]:
    """The modules of the linears and embeddings that read a weight."""
    return sorted({str(user.meta.get("path", "")) for user in node.users if user.target in (_LINEAR, _EMBEDDING)})


def _check_layer(layer: Layer, where: str, skeleton: Skeleton) -> None:
    if not layer.kind:
        raise BitlowerError(f"{where} is not the weight of a linear layer or embedding of {skeleton.architecture}")
    if not any(user.target in (_LINEAR, _EMBEDDING) for user in layer.node.users):
        raise BitlowerError(f"{where} is read in another orientation than [out, in]", hint="run the pass `clean` first")
    expected = skeleton.shapes[f"{layer.path}.weight"]
    if layer.shape != (expected[::-1] if layer.kind == CONV1D else expected):
        raise BitlowerError(f"{where} has the shape {list(layer.shape)}, {skeleton.architecture} {list(expected)}")


def _float_weights(program: Program, skeleton: Skeleton) -> Iterator[tuple[str, fx.Node]]:
    """The weights of the model that stay in float; buffers that it makes anew when it loads are left out."""
    for node in program.graph.find_nodes(op="get_attr", sort=True):
        target = str(node.target)
        if names := skeleton.names_of(target):
            yield from ((name, node) for name in names)
        elif isinstance(get_tensor(program.module, target), torch.nn.Parameter):
            raise BitlowerError(f"{target} is no weight of {skeleton.architecture}, so no checkpoint can hold it")


def _float(name: str, node: fx.Node, module: fx.GraphModule, skeleton: Skeleton) -> Float:
    across = any(user.target is _LINEAR and LinearNode(user).weight is node for user in node.users)
    shape, expected = node.meta["type"].shape, skeleton.shapes[name]
    kernel = expected[2:] if len(shape) == 2 and shape[1] == math.prod(expected[1:]) else ()
    turned = across and skeleton.kinds.get(name.rpartition(".")[0]) == CONV1D
    long = tuple(axis for axis, size in enumerate(expected) if size > 1) if name.endswith(NORMED[0]) else ()
    entry = Float(name, str(node.target), turned, module, kernel, long)
    if tuple(entry.value().shape) != expected:
        shapes = list(entry.value().shape), list(expected)
        raise BitlowerError(f"{name} has the shape {shapes[0]}, {skeleton.architecture} {shapes[1]}")
    return entry


def unpacked_linears(skeleton: Skeleton, layers: tuple[Layer, ...]) -> list[str]:
    """The linear layers of the model that stay in float, the output head among them."""
    packed = {layer.path for layer in layers}
    linears = [path for path, kind in skeleton.kinds.items() if kind in (LINEAR, CONV1D)]
    return [path for path in linears if not packed.intersection(skeleton.pieces.get(path, [path]))]
