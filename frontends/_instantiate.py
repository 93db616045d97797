"""From the trace of a few layers to that of them all: each further layer is one of the traced with weights of its own.

The nodes of a layer are those that its modules made, known by their paths. A layer reads parameters of its own, its own
entries of the cache, what the layer before it gave, what the first layer gave for all (T5's relative positions), and
what was computed before the layers (masks, sines and cosines). A trace that does not fall apart so is refused here, and
the caller traces the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from bitlower.frontends._layers import Layers, representatives, shortened
from bitlower.frontends._trace import type_tensors
from bitlower.frontends.weights import model_tensors
from bitlower.ir import BitlowerError, Program, ValueSpec, get_tensor, set_tensor
from bitlower.ir.experts import experts_as_linears
from bitlower.ir.operators import graph_results, operand
from bitlower.ir.tensors import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZE = torch.ops.aten.sym_size.int
_CACHE = re.compile(r"((?:past_key_values|present)\.)(\d+)(\..+)")
"""The names of a cache's inputs and outputs, with the layer."""


def trace_by_layers(model: PreTrainedModel, trace: Callable[[], Program], check: Callable[[Program], None]) -> Program:
    """The trace of ``model``, checked; of layers that repeat only a few are traced.

    Args:
        model: as it is traced.
        trace: traces the model as it is at that moment.
        check: raises a CheckError where a trace does not compute what the model does.

    Raises:
        BitlowerError: what ``trace`` and ``check`` raise of the whole model.
    """
    layers = representatives(model)
    if layers is not None:
        try:
            with shortened(model, layers):
                short = trace()
            with experts_as_linears(model):
                program = instantiate(short, layers, model_tensors(model))
            check(program)
            return program
        except (BitlowerError, NotImplementedError):
            pass  # its layers are not as they look, or its configuration counts them itself: the whole model is traced
    program = trace()
    check(program)
    return program


def instantiate(short: Program, layers: Layers, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The Program of all layers, from that of ``layers.traced``.

    Args:
        short: traced with those layers alone, numbered from 0.
        layers: which layers they are and for which they stand.
        tensors: parameters and buffers of the whole model by name.

    Raises:
        BitlowerError: the trace does not fall apart into layers, or two layers of a kind differ in it.
    """
    traced = _Traced(short, layers.path, len(layers.traced), tensors)
    for first, second in _pairs(layers):
        if traced.form(first) != traced.form(second):
            raise BitlowerError(f"the layers {layers.traced[first]} and {layers.traced[second]} differ in their traces")
    return _Writer(traced, layers).program()


def _pairs(layers: Layers) -> Iterator[tuple[int, int]]:
    """Traced layers that must be equal: one that stands for others, and one before it that is of its kind."""
    for order in range(1, len(layers.traced) - 1):
        for later in range(order + 1, len(layers.traced)):
            if layers.alike(order, later):
                yield order, later


class _Traced:
    """A trace of a few layers, taken apart.

    ``label`` is the layer of each node, None for what belongs to none; ``segments`` are the nodes in their order: those
    of no layer one by one, those of layers together, by layer.
    """

    def __init__(self, program: Program, path: str, count: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.program, self.count, self.tensors = program, count, tensors
        self.number = re.compile(rf"^({re.escape(path)}\.|past_key_values_)(\d+)(?=[._]|$)")
        self.nodes = [node for node in program.graph.nodes if node.op != "output"]
        specs = iter(program.inputs)
        self.label = {n: self._layer(next(specs).name if n.op == "placeholder" else None, n) for n in self.nodes}
        for node in self.nodes:
            if self._is_shared_size(node):
                self.label[node] = None
        self.segments = list(self._segments())
        self.place = {
            node: place
            for layer in range(count)
            for place, node in enumerate(n for n in self.nodes if self.label[n] == layer)
        }
        self.of_first = {
            x for node in self.nodes for x in node.all_input_nodes if self.label[x] == 0 and (self.label[node] or 0) > 1
        }
        results = graph_results(program.graph)
        self.results = {x for spec, x in zip(program.outputs, results, strict=True) if not _CACHE.fullmatch(spec.name)}
        self.layer_outputs = [self._outputs_of(layer) for layer in range(count)]
        if len({tuple(node.meta.get("type") for node in values) for values in self.layer_outputs}) != 1:
            raise BitlowerError("the layers do not give one kind of value to each other")
        self._check()

    def _layer(self, name: str | None, node: fx.Node) -> int | None:
        if name is not None:
            match = _CACHE.fullmatch(name)
            return int(match[2]) if match else None
        path = str(node.target) if node.op == "get_attr" else node.meta.get("path", "")
        match = self.number.match(path)
        return int(match[2]) if match else None

    def _is_shared_size(self, node: fx.Node) -> bool:
        """Whether a layer computes a size from sizes outside of it that a later layer reads too."""
        outside = all(self.label[x] is None for x in node.all_input_nodes)
        alone = all(self.label.get(user) == self.label[node] for user in node.users)
        return node.op == "call_function" and "type" not in node.meta and outside and not alone

    def _segments(self) -> Iterator[fx.Node | dict[int, list[fx.Node]]]:
        run: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            layer = self.label[node]
            if layer is None:
                if run:
                    yield run
                run = {}
                yield node
            elif run and layer < max(run):
                raise BitlowerError("the layers are not traced one after the other")
            else:
                run.setdefault(layer, []).append(node)
        if run:
            yield run

    def _outputs_of(self, layer: int) -> list[fx.Node]:
        """What others read of a layer: the next one, what comes after the last, or the caller."""

        def is_given(node: fx.Node) -> bool:
            others = [user for user in node.users if self.label.get(user) != layer and user.op != "output"]
            return node in self.results or not all(map(self.is_size, others))

        own = [node for node in self.nodes if self.label[node] == layer and node not in self.of_first]
        return [node for node in own if is_given(node)]

    def is_size(self, node: fx.Node) -> bool:
        """Whether ``node`` belongs to no layer and reads a size of an input that does."""
        return node.target is _SIZE and self.label[node] is None and operand(node, "self").op == "placeholder"

    def _check(self) -> None:
        """See that no layer reads what was computed from layers outside of them."""
        after: set[fx.Node] = set()
        for node in self.nodes:
            if self.is_size(node):
                continue
            late = any(x in after or self.label[x] is not None for x in node.all_input_nodes)
            if self.label[node] is None and late:
                after.add(node)
            elif self.label[node] is not None and any(x in after for x in node.all_input_nodes):
                raise BitlowerError("something between the layers belongs to none of them")

    def form(self, layer: int) -> list[Any]:
        """A layer without its number, to compare it with others."""
        return [self._node(node, layer) for node in self.nodes if self.label[node] == layer]

    def _node(self, node: fx.Node, layer: int) -> tuple[Any, ...]:
        def operand(x: fx.Node) -> tuple[Any, ...]:
            if self.label[x] == layer:
                return "own", self.place[x]
            if x in self.of_first or self.label[x] is None:
                return ("shared", x.name) if x.op != "get_attr" else ("tensor", self._tensor(x))
            return "given", self.output_index(x, layer)

        target = node.target
        if node.op == "placeholder":
            target = self.without_number(str(target))
        elif node.op == "get_attr":
            target = self._tensor(node)
        meta = {**node.meta, "path": self.without_number(node.meta.get("path", ""))}
        return node.op, target, map_arg(node.args, operand), map_arg(node.kwargs, operand), meta

    def _tensor(self, node: fx.Node) -> str:
        """A tensor of the model by its name without the layer's number, one that the trace made by what is in it."""
        name = str(node.target)
        if name in self.tensors:
            return self.without_number(name)
        return tensor_digest(get_tensor(self.program.module, name))

    def without_number(self, name: str) -> str:
        """A path, a parameter's name or an input's without the layer in it."""
        return self.number.sub(r"\1", name)

    def output_index(self, node: fx.Node, layer: int) -> int:
        """Which of the values that the layer before ``layer`` returns ``node`` is."""
        if self.label[node] != layer - 1 or node not in self.layer_outputs[layer - 1]:
            raise BitlowerError("a layer reads what is not of the one before it")
        return self.layer_outputs[layer - 1].index(node)


class _Writer:
    """Writes the graph of all layers."""

    def __init__(self, traced: _Traced, layers: Layers) -> None:
        self.traced, self.layers, self.last = traced, layers, len(layers.stands_for) - 1
        self.graph = fx.Graph()
        self.shared: dict[fx.Node, fx.Node] = {}
        self.own: list[dict[fx.Node, fx.Node]] = [{} for _ in layers.stands_for]
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())

    def program(self) -> Program:
        """The whole Program."""
        short = self.traced.program
        for segment in self.traced.segments:
            self._segment(segment)
        inputs = self._specs(short.inputs)
        outputs, values = self._outputs()
        self.graph.output(values)
        self.graph.output_node().meta = dict(short.graph.output_node().meta)
        module = fx.GraphModule(self.module, self.graph)
        type_tensors(module)
        program = Program({"model": module}, short.level, short.task, inputs, outputs, lengths=dict(short.lengths))
        program.notes = short.notes
        program.recompile()
        return program

    def _segment(self, segment: fx.Node | Mapping[int, list[fx.Node]]) -> None:
        if isinstance(segment, fx.Node):
            self.shared[segment] = self._copy(segment, self._outside(segment), None)
            return
        for layer, order in enumerate(self.layers.stands_for):
            for node in segment.get(order, ()):
                self.own[layer][node] = self._copy(node, self._inside(layer), layer)

    def _copy(self, node: fx.Node, operand: Callable[[fx.Node], fx.Node], layer: int | None) -> fx.Node:
        named = node.op in ("get_attr", "placeholder")
        target = self._numbered(str(node.target), layer) if named else node.target
        if node.op == "get_attr":
            self._hold(str(target), str(node.target))
        args, kwargs = map_arg(node.args, operand), map_arg(node.kwargs, operand)
        copy = self.graph.create_node(node.op, target, args, kwargs)
        copy.meta = dict(node.meta)
        if "path" in node.meta:
            copy.meta["path"] = self._numbered(node.meta["path"], layer)
        return copy

    def _hold(self, name: str, traced: str) -> None:
        """Have the model's tensor of that name, or that of the short trace which it made itself."""
        own = self.traced.tensors.get(name)
        set_tensor(self.module, name, get_tensor(self.traced.program.module, traced) if own is None else own)

    def _numbered(self, name: str, layer: int | None) -> str:
        if layer is None:
            return name
        return self.traced.number.sub(rf"\g<1>{layer}", name)

    def _inside(self, layer: int) -> Callable[[fx.Node], fx.Node]:
        """What stands for an operand of a node in ``layer``."""
        order = self.layers.stands_for[layer]

        def operand(x: fx.Node) -> fx.Node:
            if self.traced.label[x] == order:
                return self.own[layer][x]
            if x in self.traced.of_first:
                return self.own[0][x]
            if x in self.shared:
                return self.shared[x]
            return self._layer_output(layer - 1, self.traced.output_index(x, order))

        return operand

    def _layer_output(self, layer: int, place: int) -> fx.Node:
        return self.own[layer][self.traced.layer_outputs[self.layers.stands_for[layer]][place]]

    def _outside(self, node: fx.Node | None) -> Callable[[fx.Node], fx.Node]:
        """What stands for an operand of a node that belongs to no layer, or for an output."""
        count = self.traced.count

        def operand(x: fx.Node) -> fx.Node:
            if x in self.shared:
                return self.shared[x]
            order = self.traced.label[x]
            if node is not None and self.traced.is_size(node):
                layer = self.last if order == count - 1 else self.layers.traced[order or 0]
                return self.graph_input(x, layer)
            return self._layer_output(self.last, self.traced.output_index(x, count))

        return operand

    def graph_input(self, node: fx.Node, layer: int) -> fx.Node:
        """The input of ``layer`` that is called as ``node`` but for the number."""
        name = self._numbered(str(node.target), layer)
        return next(other for other in self.own[layer].values() if other.op == "placeholder" and other.target == name)

    def _specs(self, specs: tuple[ValueSpec, ...]) -> tuple[ValueSpec, ...]:
        """Inputs of all layers."""
        return tuple(spec for spec, _, _ in self._per_layer(list(zip(specs, specs, strict=True))))

    def _outputs(self) -> tuple[tuple[ValueSpec, ...], tuple[fx.Node, ...]]:
        """Outputs of all layers, with the nodes that compute them."""
        result_nodes = graph_results(self.traced.program.graph)
        specs, values = [], []
        for spec, node, layer in self._per_layer(list(zip(self.traced.program.outputs, result_nodes, strict=True))):
            specs.append(spec)
            values.append(self._outside(None)(node) if layer is None else self._inside(layer)(node))
        return tuple(specs), tuple(values)

    def _per_layer(self, entries: list[tuple[ValueSpec, Any]]) -> Iterator[tuple[ValueSpec, Any, int | None]]:
        """Each entry that belongs to no layer, and where the first of a layer stands, those of all layers."""
        by_layer: dict[int, list[tuple[ValueSpec, Any, Any]]] = {}
        for spec, value in entries:
            if match := _CACHE.fullmatch(spec.name):
                by_layer.setdefault(int(match[2]), []).append((spec, value, match))
        if by_layer and sorted(by_layer) != list(range(self.traced.count)):
            raise BitlowerError("not every layer has a cache of its own")
        written = False
        for spec, value in entries:
            if _CACHE.fullmatch(spec.name) is None:
                yield spec, value, None
            elif not written:
                written = True
                for layer, order in enumerate(self.layers.stands_for):
                    for own, node, match in by_layer[order]:
                        yield ValueSpec(f"{match[1]}{layer}{match[3]}", own.type), node, layer
