"""Reorder channels by their ranges, so that per-embedding groups hold channels of like range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import fx

from bitlower.ir import BitlowerError, Level, Program, get_tensor
from bitlower.ir.dataflow import NORM, VIEWS, activations, residual_sums
from bitlower.ir.feed_forward import feed_forwards
from bitlower.ir.operators import NormNode
from bitlower.ir.permutation.domains import Domain, Domains, domains
from bitlower.ir.permutation.reorder import insert_gather, reorder
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.patterns import Patterns
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes.outliers._channel_statistics import ChannelStatistics, channel_statistics
from bitlower.passes.outliers._orders import grouped_order, range_order

Statistics = dict[fx.Node, ChannelStatistics]


@dataclass(frozen=True)
class ReorderedDomain:
    """A permutation domain and its new order.

    Args:
        size: how many channels are ordered.
        structure: ``free``, or ``within`` where it is a part of an axis, such as the dimensions inside each head.
        residual: whether it is the channels of a residual stream.
        values: the computed tensors that have it, each with the axis.
        parameters: the stored tensors that have it, each with the axis.
        order: the old channel of each new one.
    """

    size: int
    structure: str
    residual: bool
    values: tuple[tuple[str, int], ...]
    parameters: tuple[tuple[str, int], ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class PermutationReport(Record):
    """What ``peg-permute`` did.

    Args:
        scope: as asked for.
        domains: those that have an order now, though it may be the one that they had.
        unchanged: residual streams that were left alone, in words.
        gathers: how many gathers by a stored index are in the graph.
    """

    scope: str
    domains: tuple[ReorderedDomain, ...]
    unchanged: tuple[str, ...]
    gathers: int

    def summary(self) -> str:
        """What was reordered."""
        channels = sum(domain.size for domain in self.domains)
        domains = counted(len(self.domains), "domain")
        text = f"{counted(channels, 'channel')} in {domains} ordered by range ({self.scope})"
        return f"{text}; {counted(self.gathers, 'gather')} in the graph" if self.gathers else text

    def details(self) -> Iterable[str]:
        """Residual streams that keep their order, and why."""
        return few(self.unchanged)


@dataclass(frozen=True)
class PegPermute(Pass):
    """Range-based permutation of channels (Bondarenko et al. 2021, §4), folded into the weights.

    Channels are sorted by max − min over the calibration batches, ascending, so that the last per-embedding group holds
    the outliers. All tensors that have to follow are found in the graph as permutation domains. The function of the
    program does not change.
    """

    name: ClassVar[str] = "peg-permute"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    contract: ClassVar[Contract] = Contract.EXACT
    rewrites_weights: ClassVar[bool] = True
    scope: Literal["network", "layer"] = "network"
    """One order for the whole residual stream, or one a layer with a gather each."""
    inner: bool = True
    """Sort inner channels too: those of feed-forward parts, and dimensions inside heads where no cache holds them."""
    groups: Annotated[int, Ge(0)] = 0
    """For so many equal groups, set outliers apart where that loses less; 0: the order is ascending."""
    bits: Annotated[int, Interval(ge=2, le=16)] = 8
    """The bits of activations that ``groups`` reckons with."""
    ignore: tuple[str, ...] = ()
    """Module paths; a domain that holds anything of one keeps its order."""

    def data_runs(self, program: Program) -> int:
        """One, for the ranges of channels."""
        return 1

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Reorder, and leave a :class:`PermutationReport`.

        Raises:
            BitlowerError: there is no calibration data, or a pattern in ``ignore`` matches nothing.
        """
        if not context.calibration:
            raise BitlowerError("peg-permute needs calibration data", hint="give calibration batches")
        if self.scope == "layer":
            cut_layers(program.module)
        all_domains = domains(program.module)
        ignored = _ignored(all_domains, Patterns(self.ignore))
        chosen = {d: values for d, values in _sources(program, all_domains, self).items() if d not in ignored}
        observed = [value for values in chosen.values() for value in values]
        statistics = channel_statistics(program, observed, context, "ranges of channels")
        orders = {}
        for domain, values in chosen.items():
            order = self._order([statistics[v] for v in values if v in statistics])
            if order is not None:
                orders[domain] = order
        report = [_describe(domain, order) for domain, order in orders.items()]
        unchanged_streams = tuple(str(domain) for domain in all_domains if domain.residual and domain not in orders)
        gathers = reorder(program.module, all_domains, orders)
        context.put(PermutationReport(self.scope, tuple(report), unchanged_streams, gathers))
        return any(entry.order != tuple(range(entry.size)) for entry in report)

    def _order(self, values: Sequence[ChannelStatistics]) -> torch.Tensor | None:
        """The order for tensors that share one; None if nothing was seen of them, or they are constant."""
        moving = [value for value in values if float(value.ranges.max()) > 0]
        if not moving:
            return None
        if self.groups > 1 and moving[0].low.numel() % self.groups == 0:
            return grouped_order(moving, self.groups, self.bits)
        return range_order(moving)


def cut_layers(module: fx.GraphModule) -> None:
    """Let every layer but the first enter its feed-forward part through a gather, so that it may have an own order.

    Where the last layer shares its order with the first after that, as a head tied to the embedding makes it, one more
    gather lies between the last layer and the head.
    """
    parts = feed_forwards(module.graph)
    if len(parts) < 2:
        return
    for part in parts[1:]:
        enters = part.stream
        if enters.target in NORM and len(NormNode(enters).x.users) == 1:
            enters = NormNode(enters).x  # post-norm: what the norm gives has the layer's order already
        _cut(module, enters)
    all_domains = domains(module)
    first, last = (all_domains.at(part.output, _last_axis(part.output)) for part in (parts[0], parts[-1]))
    if first == last:
        _cut(module, residual_sums(module.graph)[-1])


def _cut(module: fx.GraphModule, value: fx.Node) -> None:
    """Let all that reads ``value`` read it through a gather, which does nothing so far."""
    readers = list(value.users)
    axis = _last_axis(value)
    with module.graph.inserting_before(value.next):
        gather = insert_gather(module, value, axis, torch.arange(int(value.meta["type"].shape[axis])))
    for reader in readers:
        reader.replace_input_with(value, gather)


def _last_axis(node: fx.Node) -> int:
    return len(node.meta["type"].shape) - 1


def _sources(program: Program, all_domains: Domains, settings: PegPermute) -> dict[Domain, list[fx.Node]]:
    """The domains to reorder, each with the values whose ranges decide its order."""
    computed = activations(program.module)
    outputs = set(_of_layers(program.graph)) if settings.scope == "layer" else set()
    sources = {}
    for domain in all_domains:
        inside = settings.inner and not domain.outputs and _is_learned(program.module, domain)
        if domain.frozen or domain.inputs or not (domain.residual or inside):
            continue
        values = [node for node, axis in domain.values if node in computed and _is_last(domain, node, axis)]
        values = [node for node in values if node.target not in VIEWS or node.all_input_nodes[0] not in values]
        if values:
            sources[domain] = [node for node in values if node in outputs and domain.residual] or values
    return sources


def _of_layers(graph: fx.Graph) -> Iterator[fx.Node]:
    """What alone decides the order of a post-norm layer: its feed-forward output, which brings in the outliers.

    A pre-norm layer carries the outliers of those before it along, so there all tensors of the layer decide.
    """
    for part in feed_forwards(graph):
        if part.stream.target in NORM:
            yield part.output


def _is_learned(module: fx.GraphModule, domain: Domain) -> bool:
    """Whether all that is stored along the domain are weights; rotary frequencies, which models make anew, are not."""
    return all(isinstance(get_tensor(module, name), torch.nn.Parameter) for name, _ in domain.parameters)


def _is_last(domain: Domain, node: fx.Node, axis: int) -> bool:
    """Whether the domain is the whole last axis of ``node``."""
    return axis == _last_axis(node) and (node, axis) in domain.whole


def _ignored(all_domains: Domains, patterns: Patterns) -> set[Domain]:
    paths = {domain: _paths(domain) for domain in all_domains}
    ignored = {domain for domain in all_domains if patterns.match(*paths[domain])}
    patterns.require_used("ignore", sorted({path for names in paths.values() for path in names}))
    return ignored


def _paths(domain: Domain) -> list[str]:
    """The module paths that a domain has to do with."""
    modules = [name.rpartition(".")[0] for name, _ in domain.parameters]
    return sorted({*modules, *(str(node.meta.get("path", "")) for node, _ in domain.values)} - {""})


def _describe(domain: Domain, order: torch.Tensor) -> ReorderedDomain:
    values = tuple((node.name, axis) for node, axis in domain.values)
    indices = tuple(order.tolist())
    return ReorderedDomain(domain.size, domain.structure, domain.residual, values, domain.parameters, indices)
