"""The ledger: what every lossy pass cost, against the program that entered the pipeline, on held-out batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Program
from bitlower.ir.dataflow import linears, residual_sums
from bitlower.ir.observe import stream
from bitlower.ir.operators import graph_results
from bitlower.ir.tokens import token_dim, token_mask
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.digest import digest_batches, digest_program
from bitlower.passes._machinery.observers import Recorder
from bitlower.passes._machinery.pipeline import format_pipeline

_PART = 1 << 20
"""Entries that are compared at a time, in float64: logits are large."""
_OUTPUT = "output: "


class Ledger(Recorder):
    """After every lossy pass that changed the program, a row of losses; the first program seen is the reference.

    A row holds the pass as text, the bytes of all tensors, for each output the relative error ``‖ŷ − y‖ / ‖y‖``, the
    mean cosine similarity of vectors along the last axis and, for logits, the mean KL divergence of the softmax
    (nats), and for each linear and residual sum the signal-to-quantization-noise ratio in dB (None: no noise at all).
    Padded positions do not count. Without evaluation batches a row holds sizes only.
    """

    def __init__(self) -> None:
        self.reference: Program | None = None
        self.rows: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Keep the first program as the reference."""
        self._last = None
        if self.reference is None:
            self.reference = program

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Measure a lossy change."""
        if changed and pass_.contract is Contract.LOSSY and self.reference is not None:
            row: dict[str, Any] = {"pass": format_pipeline([pass_]), "bytes": program.size_bytes()}
            if context.evaluation:
                row |= compare(self.reference, program, context)
            self.restore(row)

    def to_dict(self) -> dict[str, Any]:
        """The reference's size and all rows, as plain data; floats have six significant digits."""
        return {"reference": {"bytes": self.reference.size_bytes() if self.reference else 0}, "rows": self.rows}

    def key(self, context: Context) -> str:
        """The reference and the evaluation batches."""
        reference = digest_program(self.reference) if self.reference else ""
        return f"ledger-{hashlib.sha256(f'{reference} {digest_batches(context.evaluation)}'.encode()).hexdigest()}"

    def row(self) -> dict[str, Any] | None:
        """The row of the last pass."""
        return self._last

    def restore(self, row: Any) -> None:
        """Add a row."""
        self._last = row
        self.rows.append(row)


@dataclass
class _Energies:
    """Sums over batches for one value: of the signal, of the noise, of vectors' cosines and KL divergences."""

    signal: float = 0.0
    noise: float = 0.0
    cosine: float = 0.0
    divergence: float = 0.0
    vectors: int = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor, *, deep: bool = False) -> None:
        """Take one batch; ``deep`` also takes cosines and divergences along the last axis."""
        if not expected.numel():
            return
        width = expected.shape[-1] if expected.dim() else 1
        pairs = (torch.split(t.reshape(-1, width), max(_PART // width, 1)) for t in (expected, actual))
        for rows, others in zip(*pairs, strict=True):
            self._add_rows(rows.double(), others.double(), deep=deep and expected.dim() > 0)

    def _add_rows(self, rows: torch.Tensor, others: torch.Tensor, *, deep: bool) -> None:
        self.signal += float(rows.square().sum())
        self.noise += float((others - rows).square().sum())
        if deep:
            self.vectors += rows.shape[0]
            self.cosine += float(torch.cosine_similarity(rows, others, dim=-1).sum())
            log_p, log_q = rows.log_softmax(-1), others.log_softmax(-1)
            self.divergence += float((log_p.exp() * (log_p - log_q)).sum())

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
    """Runs two programs side by side, one batch at a time; a value is held until the other program's is there."""

    reference: Program
    program: Program
    layers: dict[str, _Energies] = field(default_factory=dict)
    outputs: dict[str, _Energies] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.reference.graph
        names = {node.name for node in self.program.graph.nodes}
        order = {node: position for position, node in enumerate(graph.nodes)}
        nodes = sorted({*linears(graph), *residual_sums(graph)}, key=order.__getitem__)
        self.layers = {node.name: _Energies() for node in nodes if node.name in names}
        self.outputs = {spec.name: _Energies() for spec in self.reference.outputs if spec.type.is_float}

    def add(self, batch: Batch) -> None:
        """Run both programs on ``batch``, side by side: what has been compared is let go of."""
        ours, pending = _values(self.reference, self.layers, batch), dict[str, torch.Tensor]()
        for name, value in _values(self.program, self.layers, batch):
            while name not in pending:
                first, expected = next(ours)
                pending[first] = expected
            pair = pending.pop(name), value
            if name in self.layers:
                self.layers[name].add(*pair)
            else:
                self.outputs[name.removeprefix(_OUTPUT)].add(*pair, deep=True)


def compare(reference: Program, program: Program, context: Context) -> dict[str, Any]:
    """Losses of ``program``'s outputs and layers against ``reference`` over the evaluation batches; rounded floats."""
    comparison = _Comparison(reference, program)
    for batch in context.track(context.evaluation, "ledger"):
        comparison.add(batch)
    paths = {node.name: str(node.meta.get("path", "")) for node in reference.graph.nodes}
    return {
        "outputs": {name: _output_row(name, energies) for name, energies in comparison.outputs.items()},
        "layers": [
            {"node": name, "path": paths[name], "sqnr_db": _rounded(energies.sqnr_db)}
            for name, energies in comparison.layers.items()
        ],
    }


def _output_row(name: str, energies: _Energies) -> dict[str, float | None]:
    count = max(energies.vectors, 1)
    row = {
        "relative_error": _rounded(energies.relative_error),
        "cosine": _rounded(energies.cosine / count),
    }
    if "logits" in name:
        row["kl_divergence"] = _rounded(max(energies.divergence / count, 0.0))
    return row


def _rounded(value: float | None) -> float | None:
    """Six significant digits; None for what JSON cannot hold."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _values(program: Program, layers: Mapping[str, Any], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of ``layers`` by name, and the float outputs by ``_OUTPUT`` and theirs, as one run returns them.

    Padding is left out of those that are laid out ``[batch, tokens, …]``.
    """
    names: dict[fx.Node, list[str]] = {node: [node.name] for node in program.graph.nodes if node.name in layers}
    for spec, node in zip(program.outputs, graph_results(program.graph), strict=True):
        if spec.type.is_float:
            names.setdefault(node, []).append(f"{_OUTPUT}{spec.name}")
    for node, value in stream(program, names, batch):
        mask = token_mask(batch, token_dim(node.meta["type"].shape))
        padded = mask is not None and value.dim() > 1 and value.shape[:2] == mask.shape and not bool(mask.all())
        for name in names[node]:
            yield name, value[mask] if padded else value
