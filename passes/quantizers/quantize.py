"""Place quantizers: every tensor whose role the scheme names gets one, uncalibrated until ``calibrate`` runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from bitlower.ir import BitlowerError, Level, Program, Quantizer, QuantSpec, Scheme, get_tensor
from bitlower.ir.dataflow import ATTENTION, QUANTIZER, VIEWS
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.patterns import Patterns
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes.quantizers._convolutions import INPUT, WEIGHT, convolution_spec
from bitlower.passes.quantizers._expand_attention import expand_attention
from bitlower.passes.quantizers._placement import (
    QuantizationSite,
    input_sites,
    insert_quantizer,
    routing,
    value_sites,
    weight_sites,
)

ROUTER = "it chooses experts"
_INSIDE_ATTENTION = ("scores", "probs")
LARGE_HEAD, LARGE_SHARE = 1 << 20, 0.01
"""An output head of so many weights, and of this share of all, is large."""


@dataclass(frozen=True)
class PlacementRow:
    """One tensor: its role, module path and spec; ``spec`` is empty where it stays float, and ``reason`` says why."""

    tensor: str
    role: str
    path: str
    spec: str
    reason: str


@dataclass(frozen=True)
class PlacementReport(Record):
    """Every tensor that could be quantized, in execution order, and what became of it."""

    rows: tuple[PlacementRow, ...]

    def summary(self) -> str:
        """How many tensors get quantizers."""
        placed = sum(bool(row.spec) for row in self.rows)
        return f"{placed:,} of {counted(len(self.rows), 'tensor')} have quantizers; the others stay float"

    def details(self) -> Iterable[str]:
        """Why tensors stay float, the most frequent reason first."""
        reasons = Counter(row.reason for row in self.rows if not row.spec)
        return few(f"{counted(count, 'tensor')}: {reason}" for reason, count in reasons.most_common())


@dataclass(frozen=True)
class Quantize(Pass):
    """Insert fake-quantize nodes as a scheme says; they are uncalibrated, so the numbers stay (but for dynamic ones).

    What has a quantizer already keeps it, so several of these passes in a row give parts of the model schemes of their
    own: the first that takes a tensor decides.

    Attention is opened up into matmuls and softmax only where the scheme quantizes inside it. A value that has a
    quantizer of its own needs none at the linears that read it.

    A language model's output head goes with the embedding table, which it shares its weight with as a rule: the table
    is quantized once, as the scheme says for ``embedding-table``, and both read the same codes. Where the scheme leaves
    tables in float, a head stays float too, with its input, unless the scheme has bits for large heads and the head
    has ``LARGE_HEAD`` weights and ``LARGE_SHARE`` of the model's; tables of token embeddings go with it.

    Convolutions have a scale an output channel and one for their input. Where the scheme has another granularity for
    one of both (groups of inputs, a scale a token), they stay float, and the report says why.

    The routers of a mixture of experts stay float, with their inputs, unless ``targets`` name them: they are small, and
    a token that goes to another expert is another token.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT, Level.SIMULATED})
    ensures: ClassVar[Level | None] = Level.SIMULATED
    contract: ClassVar[Contract] = Contract.LOSSY
    scheme: Scheme = field(default_factory=Scheme)
    """What each role becomes: a name such as W8A8, or the long form."""
    ignore: tuple[str, ...] = ()
    """Patterns of module paths whose tensors stay float."""
    targets: tuple[str, ...] = ()
    """Patterns of module paths to quantize; all if empty."""

    def run(self, program: Program, context: Context) -> bool:
        """Place the quantizers and leave a :class:`PlacementReport`."""
        report = place(program, self.scheme, Patterns(self.ignore), Patterns(self.targets))
        context.put(report)
        return True


def place(program: Program, scheme: Scheme, ignore: Patterns, targets: Patterns) -> PlacementReport:
    """Quantize every site that ``scheme``, ``targets`` and ``ignore`` admit.

    Raises:
        BitlowerError: a pattern matches nothing, nothing at all is quantized, or a granularity does not fit a tensor.
    """
    if any(scheme.spec(role) for role in _INSIDE_ATTENTION):
        _expand_attentions(program, ignore, targets)
    before = len(list(program.quantizers()))
    rows: list[PlacementRow] = []
    weights = list(weight_sites(program.graph))
    sites = [*weights, *value_sites(program.graph)]
    total = sum(tensor.numel() for _, tensor in program.tensors())
    specs = [_spec(program, site, scheme, total) for site in sites]
    chosen = set() if targets.patterns else routing(program.graph)
    for site, spec in zip(sites, specs, strict=True):
        if chosen & {site.value, *site.edges}:
            rows.append(PlacementRow(site.tensor, site.role, (site.paths or ("",))[0], "", ROUTER))
        else:
            rows.append(_place_site(program, site, spec, ignore, targets))
    float_tables = [
        site for site, (spec, _) in zip(sites, specs, strict=True) if site.role == "embedding-table" and not spec
    ]
    float_heads = {edge for site in float_tables for edge in site.edges} if scheme.spec("linear-weight") else set()
    for site in list(input_sites(program.graph)):
        if site.value.target in QUANTIZER or _rounded_above(site.value):
            continue
        if chosen & set(site.edges):
            site = _without(site, chosen)
            if not site.edges:
                continue
        if set(site.edges) <= float_heads:
            rows.append(PlacementRow(site.tensor, site.role, site.paths[0], "", "its head stays in float"))
            continue
        rows.append(_place_site(program, site, _spec(program, site, scheme, total), ignore, targets))
    paths = sorted({row.path for row in rows})
    ignore.require_used("ignore", paths)
    targets.require_used("targets", paths)
    if len(list(program.quantizers())) == before:
        raise BitlowerError(f"the scheme {scheme} quantizes nothing in this model")
    return PlacementReport(tuple(rows))


def _without(site: QuantizationSite, edges: set[fx.Node]) -> QuantizationSite:
    """``site`` for its other readers."""
    remaining = [pair for pair in zip(site.edges, site.paths, strict=True) if pair[0] not in edges]
    return replace(site, edges=tuple(edge for edge, _ in remaining), paths=tuple(path for _, path in remaining))


def _expand_attentions(program: Program, ignore: Patterns, targets: Patterns) -> None:
    for node in list(program.graph.nodes):
        if node.target in ATTENTION:
            path = str(node.meta.get("path", ""))
            if not ignore.match(path) and (not targets.patterns or targets.match(path)):
                expand_attention(node)


def _spec(program: Program, site: QuantizationSite, scheme: Scheme, total: int) -> tuple[QuantSpec | None, str]:
    """What ``scheme`` says for ``site`` in a model of ``total`` weights, and why if it stays float."""
    role = "position-table" if site.positions else site.role
    if role in (WEIGHT, INPUT):
        return convolution_spec(scheme, role)
    spec = scheme.spec(role)
    if spec or not site.head or not scheme.head:
        return spec, "" if spec else f"the scheme leaves {role} in float"
    size = get_tensor(program.module, site.tensor).numel()
    if size < max(LARGE_HEAD, LARGE_SHARE * total):
        return None, f"an output head of {size:,} weights is small"
    return scheme.head, ""


def _place_site(
    program: Program, site: QuantizationSite, chosen: tuple[QuantSpec | None, str], ignore: Patterns, targets: Patterns
) -> PlacementRow:
    paths = site.paths or ("",)
    own = _quantizer_of(site)
    if own is not None:
        return PlacementRow(site.tensor, site.role, paths[0], str(own.spec), "")
    spec, reason = chosen
    names = tuple(f"{path}.weight" for path in paths) if site.value.op == "get_attr" else paths
    ignored = [ignore.match(path, name) for path, name in zip(paths, names, strict=True)]
    targeted = [not targets.patterns or targets.match(path, name) for path, name in zip(paths, names, strict=True)]
    admitted = [target and not ignore_ for target, ignore_ in zip(targeted, ignored, strict=True)]
    if spec and not any(admitted):
        reason = "ignored by a pattern" if any(ignored) else "no target pattern matches"
    if spec and not reason:
        edges = tuple(edge for edge, admit in zip(site.edges, admitted, strict=True) if admit) if site.edges else ()
        insert_quantizer(program, replace(site, edges=edges, paths=paths), spec)
    return PlacementRow(site.tensor, site.role, paths[0], "" if reason else str(spec), reason)


def _quantizer_of(site: QuantizationSite) -> Quantizer | None:
    """The quantizer that an earlier pass put on ``site``; its role may differ, for quantizers change what is found."""
    if site.role in ("linear-input", INPUT):
        return None
    return next((user.meta["quantizer"] for user in site.value.users if user.target in QUANTIZER), None)


def _rounded_above(value: fx.Node) -> bool:
    """Whether ``value`` is a view of something that is rounded already."""
    while value.target in VIEWS:
        value = value.all_input_nodes[0]
    return value.target in QUANTIZER
