"""A Program as a module that trains: its tensors are parameters, its quantizers can learn their ranges."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import fx, nn

from bitlower.ir import ops
from bitlower.ir.diagnostics import BitlowerError, describe, nearest
from bitlower.ir.learnable import LearnableQuantizer, RangeSettings
from bitlower.ir.operators import further_arguments, graph_results, set_graph_results
from bitlower.ir.program_data import ProgramData
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.storage import like
from bitlower.ir.tensors import copy_module, get_tensor, set_tensor
from bitlower.ir.types import Level

aten = torch.ops.aten
_QUANTIZERS = "quantizers."

Make = Callable[[fx.GraphModule, fx.Node], nn.Module | None]
"""From a graph and one of its ``fake_quantize`` nodes to the module that takes its place; None leaves the node."""


@dataclass(frozen=True)
class Trainable:
    """A graph that :func:`make_trainable` has worked on.

    Args:
        model: the graph, with tensors of its own.
        weights: the parameter that each quantizer's module rounds, by the module's name; activations have none.
        stored: where scale and zero point of each quantizer lie in the Program, by the module's name.
        nodes: the nodes by the names that they had.
    """

    model: fx.GraphModule
    weights: dict[str, str] = field(default_factory=dict)
    stored: dict[str, tuple[str, str]] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def weight_of(self, quantizer: str) -> torch.Tensor | None:
        """The parameter that a quantizer rounds, as it is now; None for an activation's."""
        return get_tensor(self.model, self.weights[quantizer]) if quantizer in self.weights else None

    def quantizers(self) -> dict[str, LearnableQuantizer]:
        """The quantizers that can learn their ranges, by their names in the graph."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LearnableQuantizer)}

    def changed(self, module: fx.GraphModule) -> dict[str, torch.Tensor]:
        """Parameters and ranges that are no longer those of ``module``, of which (or of a part of which) this is."""
        tensors = {
            target: get_tensor(self.model, target).detach()
            for target in _targets(self.model)
            if isinstance(get_tensor(self.model, target), nn.Parameter)
        }
        for name, quantizer in self.quantizers().items():
            ranges = quantizer.qparams(self.weight_of(name))
            tensors |= dict(zip(self.stored[name], (part.contiguous() for part in ranges), strict=True))
        return {name: value for name, value in tensors.items() if not torch.equal(value, get_tensor(module, name))}


class TrainableModule(nn.Module):
    """The graph ``model`` of a Program with tensors of its own, which an optimizer may change.

    Its outputs are those of the Program bit for bit, as long as nothing was trained. Parameters have the names that
    they have in the Program, below ``model.``; quantizers are :class:`~bitlower.ir.learnable.LearnableQuantizer`
    below ``model.quantizers.``. A parameter that several nodes read is one, and so is its quantizer. There is no
    dropout: the Program was traced without. Scales that are computed from the values (per token) have nothing to
    learn.

    Args:
        program: simulated, all its static quantizers calibrated.
        settings: how ranges behave.
        taps: names of nodes whose values are given out too, by that name.

    Raises:
        BitlowerError: the Program is lowered already, a quantizer is not calibrated, or there is no node of that name.
    """

    settings_json: torch.Tensor

    def __init__(self, program: ProgramData, settings: RangeSettings | None = None, taps: Collection[str] = ()) -> None:
        super().__init__()
        if program.level not in (Level.FLOAT, Level.SIMULATED):
            raise BitlowerError(
                f"a program at the level {program.level} cannot be trained", hint="train before `lower-integer`"
            )
        self.settings = settings or RangeSettings()
        self.register_buffer("settings_json", _encode(self.settings))
        self.program = program
        self.names = (*(spec.name for spec in program.outputs), *taps)
        self.trainable = _with_taps(program, self.settings, taps)
        self.model, self.weights = self.trainable.model, self.trainable.weights

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs and taps by name; inputs as the Program takes them."""
        if self.settings.ranges == "observed":
            batch = self.program.complete(inputs)
            for quantizer in self.quantizers().values():
                quantizer.batch = batch
        return dict(zip(self.names, self.model(*self.program.arguments(inputs)), strict=True))

    def quantizers(self) -> dict[str, LearnableQuantizer]:
        """The quantizers with stored scales, by their names in the graph ``model``."""
        return self.trainable.quantizers()

    def weight_of(self, quantizer: str) -> torch.Tensor | None:
        """The parameter that a quantizer rounds, as it is now; None for an activation's."""
        return self.trainable.weight_of(quantizer)

    def freeze_ranges(self) -> None:
        """Make the ranges of all quantizers constants: what they are now."""
        for name, quantizer in self.quantizers().items():
            quantizer.freeze(self.weight_of(name))


def write_trained(program: ProgramData, module: TrainableModule) -> None:
    """Let ``program``, of which ``module`` was made, have the module's parameters and ranges.

    Tensors that did not change stay shared; no shared one is written to.
    """
    write_tensors(program.module, module.trainable.changed(program.module))


def write_tensors(module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let ``module`` hold ``tensors`` by name; what was one tensor under two names becomes one again.

    What lay in a file lies in one again, and no shared tensor is written to.
    """
    fresh: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for name, value in tensors.items():
        old = get_tensor(module, name)
        key = identity(old)
        if key not in fresh:
            new = like(value.clone(), old)
            parameter = isinstance(old, nn.Parameter)
            fresh[key] = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new
        set_tensor(module, name, fresh[key])


def restored(program: ProgramData, state: Mapping[str, torch.Tensor]) -> TrainableModule:
    """The trainable module of ``program`` whose ``state_dict`` is ``state``.

    Raises:
        BitlowerError: ``state`` is that of another Program or of no trainable module.
    """
    if "settings_json" not in state:
        raise BitlowerError(
            "this is no state of a trainable module", hint="take that of what `program.trainable_module()` returned"
        )
    module = TrainableModule(program, RangeSettings(**json.loads(bytes(state["settings_json"].tolist()))))
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise BitlowerError(
            f"the trained state does not fit the program: {str(error).splitlines()[1].strip()}",
            hint="give it to the program that it was made of",
        ) from None
    return module


def _encode(settings: RangeSettings) -> torch.Tensor:
    return torch.tensor(list(json.dumps(asdict(settings), sort_keys=True).encode()), dtype=torch.uint8)


def _with_taps(program: ProgramData, settings: RangeSettings, taps: Collection[str]) -> Trainable:
    """The graph of ``program``, trainable, that gives out the values of ``taps`` as well."""
    known = {node.name for node in program.graph.nodes}
    for tap in taps:
        if tap not in known:
            raise BitlowerError(f"the graph has no node %{tap}", hint=nearest(tap, known))
    made = make_trainable(copy_module(program.module), lambda module, node: learnable(module, node, settings))
    set_graph_results(made.model.graph, [*graph_results(made.model.graph), *(made.nodes[tap] for tap in taps)])
    _finish(made.model)
    return made


def make_trainable(module: fx.GraphModule, make: Make) -> Trainable:
    """Give the graph ``module`` tensors of its own, and modules in place of its quantizers with stored scales.

    Quantizers with one scale become one module. Scales that are computed from values (per token) stay as they are.

    Args:
        module: a copy that may be edited; its floating-point parameters become parameters again, buffers stay buffers.
        make: what takes the place of a quantizer; it has buffers ``scale`` and ``zero_point``.
    """
    _own_tensors(module)
    made = Trainable(module, nodes={node.name: node for node in module.graph.nodes})
    modules: dict[str, nn.Module | None] = {}
    for node in static_quantizers(module):
        name = _quantizer_name(node)
        if name not in modules:
            modules[name] = new = make(module, node)
            if new is not None:
                module.set_submodule(name, new)
        if modules[name] is None:
            continue
        view = QuantizerNode(node)
        made.stored[name] = view.stored
        if view.rounds_parameter:
            made.weights[name] = view.parameter
        made.nodes.update(_replace(module.graph, node, name))
    _finish(module)
    return made


def _finish(module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    module.graph.lint()
    module.recompile()
    module.delete_all_unused_submodules()


def _own_tensors(module: fx.GraphModule) -> None:
    """Give the graph copies of all its tensors; one tensor under two names stays one."""
    copies: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for target in _targets(module):
        old = get_tensor(module, target)
        key = identity(old)
        if key not in copies:
            copy = old.detach().clone()
            copies[key] = nn.Parameter(copy) if isinstance(old, nn.Parameter) and copy.is_floating_point() else copy
        set_tensor(module, target, copies[key])


def _targets(module: fx.GraphModule) -> list[str]:
    return sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"})


def identity(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tuple(tensor.shape)


def static_quantizers(module: fx.GraphModule) -> list[fx.Node]:
    """The ``fake_quantize`` nodes whose scales are stored."""
    nodes = module.graph.find_nodes(op="call_function", target=ops.fake_quantize)
    return [node for node in nodes if QuantizerNode(node).is_static]


def _quantizer_name(node: fx.Node) -> str:
    """Where the quantizer's module lies: where its scale is stored, so that nodes with one scale are one quantizer."""
    scale = QuantizerNode(node).scale
    place = str(scale.target).rpartition(".")[0]
    return place if place.startswith(_QUANTIZERS) else f"{_QUANTIZERS}{scale.name}"


def learnable(module: fx.GraphModule, node: fx.Node, settings: RangeSettings) -> LearnableQuantizer:
    """The quantizer ``node`` of ``module`` as one that can learn its range.

    Raises:
        BitlowerError: it is not calibrated; it is named.
    """
    view = QuantizerNode(node)
    if not view.is_calibrated:
        raise BitlowerError(
            f"{describe(node)}: a quantizer without a range cannot be trained", hint="run `calibrate` first"
        )
    weight = view.weight(module) if view.rounds_parameter else None
    shape = node.meta["type"].shape if "type" in node.meta else ()
    try:
        return LearnableQuantizer(view.spec, *view.range(module), settings, weight, shape)
    except BitlowerError as error:
        raise BitlowerError(f"{describe(node)}: {error.message}", hint=error.hint) from None


def _replace(graph: fx.Graph, node: fx.Node, name: str) -> dict[str, fx.Node]:
    """Put calls of the quantizer's module in place of ``node``; embeddings round only the rows that they take."""
    source, users = QuantizerNode(node).value, list(node.users)
    lookups = all(user.target is aten.embedding.default and len(user.args) <= 3 for user in users)
    if users and lookups and source.op == "get_attr":
        return {user.name: _call(graph, user, name, (source, *further_arguments(user))) for user in users}
    return {node.name: _call(graph, node, name, (source,))}


def _call(graph: fx.Graph, node: fx.Node, name: str, arguments: tuple[fx.node.Argument, ...]) -> fx.Node:
    with graph.inserting_before(node):
        call = graph.call_module(name, arguments)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call
