"""The ledger: what every lossy pass cost, against the float program, on held-out batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Level, Program
from bitlower.ir.dataflow import linears, residual_sums
from bitlower.ir.digits import significant
from bitlower.ir.observe import stream
from bitlower.ir.operators import graph_results
from bitlower.ir.tasks import TASKS, TEXT_GENERATION
from bitlower.ir.tokens import token_dim, token_ids, token_mask
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.digest import digest_batches, digest_program
from bitlower.passes._machinery.observers import Recorder
from bitlower.passes._machinery.pipeline import format_pipeline

_PART = 1 << 20
"""Entries that are compared at a time, in float64: logits are large."""
_OUTPUT = "output: "


class Ledger(Recorder):
    """After every lossy pass that changed the program, a row of losses.

    Outputs are compared with those of the float program: the first one, as exact passes left it until a lossy one
    changed its numbers. Layers are compared with those of the last program whose channels lie as they do now: a pass
    that reorders or rotates them, such as ``peg-permute``, is exact and changes what a layer computes. Where lossy
    passes came before it, it is the program right behind it, and what they cost the layers stands in their own rows.

    A row holds the pass as text, the bytes of all tensors, for each output the relative error ``‖ŷ − y‖ / ‖y‖``, the
    mean cosine similarity of vectors along the last axis and, for logits, the mean KL divergence of the softmax
    (nats) and the share of vectors whose largest entry stays the largest, of a model that writes also the perplexity
    of both programs on the next tokens; and for each linear and residual sum the
    signal-to-quantization-noise ratio in dB (None: no noise at all). Padded positions do not count. Without evaluation
    batches a row holds sizes only.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._outputs = _Reference()
        self._layers = _Reference()
        self._last: dict[str, Any] | None = None

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Take the first program as the reference, and for layers that behind a pass which moved channels."""
        self._last = None
        if self._outputs.program is None:
            self._bytes = program.size_bytes()
            self._outputs = self._layers = _Reference(program)
        elif self._layers.is_outdated and pass_.contract is Contract.LOSSY:
            self._layers = _Reference(program)

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Measure a lossy change, or take what an exact pass made as the reference."""
        if changed and pass_.contract is Contract.EXACT:
            self._outputs, self._layers = (r.after_exact(program) for r in (self._outputs, self._layers))
        elif changed and pass_.contract is Contract.LOSSY:
            row: dict[str, Any] = {"pass": format_pipeline([pass_]), "bytes": program.size_bytes()}
            if context.evaluation and self._outputs.program and self._layers.program:
                row |= compare(self._outputs.program, program, context, layers=self._layers.program)
            self.restore(row)

    def to_dict(self) -> dict[str, Any]:
        """The reference's size and all rows, as plain data; floats have six significant digits."""
        return {"reference": {"bytes": self._bytes}, "rows": self.rows}

    def key(self, context: Context) -> str:
        """The first program and the evaluation batches; what became of it stands in every program's own history."""
        first = digest_program(self._outputs.program) if self._outputs.program else ""
        return f"ledger-3-{hashlib.sha256(f'{first} {digest_batches(context.evaluation)}'.encode()).hexdigest()}"

    def row(self) -> dict[str, Any] | None:
        """The row of the last pass."""
        return self._last

    def restore(self, row: Any) -> None:
        """Add a row."""
        self._last = row
        self.rows.append(row)
        if any(loss["relative_error"] for loss in row.get("outputs", {}).values()):
            self._outputs = replace(self._outputs, is_equal=False)
        if any(layer["sqnr_db"] is not None for layer in row.get("layers", ())):
            self._layers = replace(self._layers, is_equal=False)


@dataclass(frozen=True)
class _Reference:
    """What others are compared with.

    Args:
        program: a float program, or one whose quantizers have no ranges yet and round nothing.
        is_equal: whether only exact passes made the current program of it.
        is_outdated: whether an exact pass may have moved channels of what lossy passes had made of it.
    """

    program: Program | None = None
    is_equal: bool = True
    is_outdated: bool = False

    def after_exact(self, program: Program) -> _Reference:
        """The reference after an exact pass that gave ``program``."""
        if self.is_equal:
            return _Reference(program)
        return replace(self, is_outdated=self.is_outdated or program.level is Level.FLOAT)


@dataclass
class _Energies:
    """Sums over batches for one value: of the signal, of the noise, of vectors' cosines and KL divergences.

    ``same`` counts vectors whose largest entry stays the largest; ``losses`` are sums of both programs' cross-entropy
    over ``targets`` next tokens.
    """

    signal: float = 0.0
    noise: float = 0.0
    cosine: float = 0.0
    divergence: float = 0.0
    vectors: int = 0
    same: int = 0
    losses: tuple[float, float] = (0.0, 0.0)
    targets: int = 0

    def add(
        self, expected: torch.Tensor, actual: torch.Tensor, *, deep: bool = False, following: torch.Tensor | None = None
    ) -> None:
        """Take one batch.

        Args:
            expected: the reference's.
            actual: of the same shape.
            deep: also take what is of vectors along the last axis.
            following: the next token of each of these vectors, -1 where there is none; int64[vectors].
        """
        if not expected.numel():
            return
        width = expected.shape[-1] if expected.dim() else 1
        size = max(_PART // width, 1)
        pairs = (torch.split(t.reshape(-1, width), size) for t in (expected, actual))
        for part, (rows, others) in enumerate(zip(*pairs, strict=True)):
            a, b = rows.double(), others.double()
            self.signal += float(a.square().sum())
            self.noise += float((b - a).square().sum())
            if deep and expected.dim():
                tokens = None if following is None else following[part * size : part * size + len(rows)]
                self._add_vectors(a, b, tokens)

    def _add_vectors(self, rows: torch.Tensor, others: torch.Tensor, tokens: torch.Tensor | None) -> None:
        self.vectors += rows.shape[0]
        self.cosine += float(torch.cosine_similarity(rows, others, dim=-1).sum())
        self.same += int((rows.argmax(-1) == others.argmax(-1)).sum())
        logs = rows.log_softmax(-1), others.log_softmax(-1)
        self.divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        if tokens is not None:
            known = tokens >= 0
            self.targets += int(known.sum())
            picked = (-log[known].gather(1, tokens[known, None]).sum() for log in logs)
            first, second = (total + float(loss) for total, loss in zip(self.losses, picked, strict=True))
            self.losses = first, second

    @property
    def relative_error(self) -> float:
        """Root of noise over signal."""
        return math.sqrt(self.noise / self.signal) if self.signal else float(self.noise > 0)

    @property
    def sqnr_db(self) -> float | None:
        """Ten times the decimal logarithm of signal over noise; None without noise."""
        if not self.noise:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass
class _Comparison:
    """Runs programs side by side, one batch at a time; a value is held until the other program's is there.

    Args:
        reference: what outputs are compared with.
        program: is measured.
        base: what layers are compared with, often the reference itself.
    """

    reference: Program
    program: Program
    base: Program
    layers: dict[str, _Energies] = field(default_factory=dict)
    outputs: dict[str, _Energies] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.base.graph
        names = {node.name for node in self.program.graph.nodes}
        order = {node: position for position, node in enumerate(graph.nodes)}
        nodes = sorted({*linears(graph), *residual_sums(graph)}, key=order.__getitem__)
        self.layers = {node.name: _Energies() for node in nodes if node.name in names}
        self.outputs = {spec.name: _Energies() for spec in self.reference.outputs if spec.type.is_float}

    def add(self, batch: Batch) -> None:
        """Run both programs on ``batch``, side by side: what has been compared is let go of."""
        whole = _values(self.reference, self.layers if self.base is self.reference else {}, batch)
        inner = whole if self.base is self.reference else _values(self.base, self.layers, batch, outputs=False)
        pending = dict[str, torch.Tensor]()
        tokens = _next_tokens(self.reference, batch)
        for name, value in _values(self.program, self.layers, batch):
            while name not in pending:
                first, expected = next(inner if name in self.layers else whole)
                pending[first] = expected
            pair = pending.pop(name), value
            if name in self.layers:
                self.layers[name].add(*pair)
            else:
                output = name.removeprefix(_OUTPUT)
                self.outputs[output].add(*pair, deep=True, following=tokens.get(output))


def compare(reference: Program, program: Program, context: Context, *, layers: Program | None = None) -> dict[str, Any]:
    """Losses of ``program`` over the evaluation batches; rounded floats.

    Args:
        reference: what outputs are compared with.
        program: is measured.
        context: its evaluation batches are run.
        layers: what layers are compared with; the reference if left out.
    """
    base = layers or reference
    comparison = _Comparison(reference, program, base)
    for batch in context.track(context.evaluation, "ledger"):
        comparison.add(batch)
    paths = {node.name: str(node.meta.get("path", "")) for node in base.graph.nodes}
    return {
        "outputs": {name: _output_row(name, energies) for name, energies in comparison.outputs.items()},
        "layers": [
            {"node": name, "path": paths[name], "sqnr_db": significant(energies.sqnr_db)}
            for name, energies in comparison.layers.items()
        ],
    }


def _output_row(name: str, energies: _Energies) -> dict[str, float | None]:
    count = max(energies.vectors, 1)
    row = {
        "relative_error": significant(energies.relative_error),
        "cosine": significant(energies.cosine / count),
    }
    if "logits" in name:
        row["kl_divergence"] = significant(max(energies.divergence / count, 0.0))
        row["top1_agreement"] = significant(energies.same / count)
    if energies.targets:
        row["reference_perplexity"], row["perplexity"] = (
            significant(_exponential(loss / energies.targets)) for loss in energies.losses
        )
    return row


def _exponential(value: float) -> float:
    """Infinity where it is larger than any float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _next_tokens(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    """Of a model that writes: what follows each token that counts, by the output that foretells it; -1 at the end."""
    writes = program.task == TEXT_GENERATION or (program.task in TASKS and TASKS[program.task].sequence_to_sequence)
    ids = token_ids(batch)
    logits = next((spec for spec in program.outputs if spec.name == "logits" and spec.type.rank == 3), None)
    if not writes or ids is None or logits is None:
        return {}
    mask = token_mask(batch, token_dim(logits.type.shape))
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    following = torch.full_like(ids, -1)
    following[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -1)
    return {logits.name: following[mask]}


def _values(
    program: Program, layers: Mapping[str, Any], batch: Batch, *, outputs: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of ``layers`` by name, and float ``outputs`` by ``_OUTPUT`` and theirs, as one run returns them.

    Padding is left out of those that are laid out ``[batch, tokens, …]``.
    """
    names: dict[fx.Node, list[str]] = {node: [node.name] for node in program.graph.nodes if node.name in layers}
    for spec, node in zip(program.outputs, graph_results(program.graph), strict=True):
        if spec.type.is_float and outputs:
            names.setdefault(node, []).append(f"{_OUTPUT}{spec.name}")
    for node, value in stream(program, names, batch):
        mask = token_mask(batch, token_dim(node.meta["type"].shape))
        padded = mask is not None and value.dim() > 1 and value.shape[:2] == mask.shape and not bool(mask.all())
        for name in names[node]:
            yield name, value[mask] if padded else value
