"""What each quantizer of a program rounds: histograms, channel ranges, clipping and codes, for the report.

Everything is seen where the program is still simulated and calibrated: right before it becomes integers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, BitlowerError, Level, Program, get_tensor
from bitlower.ir.digits import significant
from bitlower.ir.observe import observe, stream
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.storage import release
from bitlower.ir.tokens import value_mask
from bitlower.passes import Context, Pass, Recorder, digest_batches
from bitlower.tools.runs.channel_maps import ChannelSizes, channel_rows, compared_sums
from bitlower.tools.runs.histogram import GrowingHistogram
from bitlower.tools.runs.samples import SampleLosses, judged_output, output_node
from bitlower.tools.runs.spread import even, spread
from bitlower.tools.runs.token_norms import TokenNorms

ENTRIES = 1 << 22
"""Of a weight; a larger one is seen in rows at even distances."""
_COUNTED_BITS = 16
"""Grids up to so many bits have their codes counted."""


class TensorStatistics(Recorder):
    """Statistics of every quantized tensor on held-out batches, of channels of the residual stream, and of samples."""

    def __init__(self) -> None:
        self._reference: Program | None = None
        self._simulated: Program | None = None
        self._row: dict[str, Any] | None = None
        self.form: dict[str, Any] = {}
        """Plain data for ``reports/tensors.json``; empty where no program became integers."""

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Remember the first program, and the one that is about to become integers."""
        self._reference = self._reference or program
        lowers = program.level is Level.SIMULATED and pass_.ensures is Level.INTEGER
        self._simulated, self._row = (program if lowers else None), None

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Look at the program that became integers."""
        if self._simulated is not None and self._reference is not None:
            self.restore(measure(self._reference, self._simulated, context))
        self._simulated = None

    def key(self, context: Context) -> str:
        """The evaluation batches; the program before the pass is in the entry's key."""
        return f"tensors-2-{hashlib.sha256(digest_batches(context.evaluation).encode()).hexdigest()}"

    def row(self) -> dict[str, Any] | None:
        """What was measured around the last pass."""
        return self._row

    def restore(self, row: Any) -> None:
        """Take what was measured."""
        self._row = self.form = row


def measure(reference: Program, program: Program, context: Context) -> dict[str, Any]:
    """What there is to know of ``program`` beside ``reference``, each run once over the evaluation batches.

    ``tensors`` has a row for each quantizer in graph order, ``channels`` one for each residual sum, ``samples`` those
    of the held-out samples whose ``output`` lies farthest from the reference's. Without evaluation batches only
    weights are seen.

    Args:
        reference: the float program; weights are compared with those of ``context.reference`` where there is one.
        program: simulated and calibrated.
        context: its evaluation batches are run.
    """
    look = _Look(reference, program)
    for tally in look.tallies:
        if tally.view.rounds_parameter:
            tally.add_weight(program, context.reference or reference)
    if context.evaluation:
        pairs = _Pairs(look, context.evaluation)
        observe(program, look.watched, pairs, look.see, track=context.track, label="tensor statistics")
    return {
        "tensors": [tally.to_dict() for tally in look.tallies if tally.count],
        "channels": channel_rows(look.sums, look.before, look.after) if context.evaluation else [],
        "output": look.losses.name,
        "samples": look.losses.worst(),
    }


class _Look:
    """What is seen of the two programs."""

    def __init__(self, reference: Program, program: Program) -> None:
        self.reference, self.program = reference, program
        self.tallies = [_Tally(QuantizerNode(node)) for node, _ in program.quantizers()]
        self.readers: dict[fx.Node, list[_Tally]] = {}
        for tally in self.tallies:
            if not tally.view.rounds_parameter:
                self.readers.setdefault(tally.view.value, []).append(tally)
        self.sums = compared_sums(reference, program)
        self.before, self.after = ChannelSizes(), ChannelSizes()
        name, place = judged_output(reference)
        self.losses = SampleLosses(name)
        self.outputs = (output_node(reference, place), output_node(program, place)) if name else None
        self.expected: torch.Tensor | None = None
        by_name = {node.name: node for node in program.graph.nodes}
        self.own_sums = {by_name[node.name] for node in self.sums}
        self.watched = {*self.readers, *self.own_sums, *(self.outputs[1:] if self.outputs else ())}

    def prepare(self, batch: Batch) -> None:
        """Run the reference on ``batch``; its output waits for the program's."""
        watched = {*self.sums, *(self.outputs[:1] if self.outputs else ())}
        for node, value in stream(self.reference, watched, batch) if watched else ():
            if node in self.sums:
                self.before.add(node, value, batch)
            if self.outputs and node is self.outputs[0]:
                self.expected = value

    def see(self, node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        """Look at a value of the program."""
        mask = value_mask(node.meta["type"].shape, batch)
        for tally in self.readers.get(node, ()):
            tally.add(value, self.program, mask)
            tally.tokens.add(value, node.meta["type"].shape, batch)
        if node in self.own_sums:
            self.after.add(node, value, batch)
        if self.outputs and node is self.outputs[1] and self.expected is not None:
            self.losses.add(node, self.expected, value, batch)
            self.expected = None


@dataclass(frozen=True)
class _Pairs:
    """Batches; before each the reference is run on it."""

    look: _Look
    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.look.prepare(batch)
            yield batch


@dataclass
class _Tally:
    """Sums over all values that one quantizer rounds."""

    view: QuantizerNode
    histogram: GrowingHistogram = field(default_factory=GrowingHistogram)
    count: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    low: float | None = None
    high: float | None = None
    channels: torch.Tensor | None = None
    tokens: TokenNorms = field(default_factory=TokenNorms)
    scales: torch.Tensor | None = None
    rewritten: dict[str, Any] | None = None
    codes: torch.Tensor | None = None
    groups: list[int] = field(default_factory=list)
    step: int = 1
    share: float = 1.0

    def add_weight(self, program: Program, reference: Program) -> None:
        """Take a parameter; of a large one some rows."""
        weight, (scale, zero) = self.view.weight(program.module), self.view.range(program.module)
        before = _same_parameter(reference, self.view.quantizer.tensor, weight)
        self.scales = scale
        step = math.ceil(weight.numel() / ENTRIES) if weight.dim() > 1 else 1
        whole = scale.dim() == 0 or scale.shape[0] in (1, len(weight))
        if step > 1 and whole:
            scale, zero = (
                part[::step] if part.dim() and part.shape[0] == len(weight) else part for part in (scale, zero)
            )
            self.share = len(weight[::step]) / len(weight)
            weight, self.step = weight[::step], step
            before = before[::step] if before is not None else None
        self._take(weight, scale, zero, None)
        if before is not None:
            self.rewritten = self._rewritten(before.float(), weight.float(), scale, zero)
        if weight.dim() > 1:
            rows = weight.detach().reshape(len(weight), -1)
            self.channels = torch.stack([rows.amin(1), rows.amax(1)])
            if scale.dim() == weight.dim() and 1 < scale.shape[0] < len(weight):
                self.groups = [row * scale.shape[0] // len(weight) for row in range(len(weight))]
        release(self.view.weight(program.module))
        if before is not None:
            release(before)

    def add(self, value: torch.Tensor, program: Program, mask: torch.Tensor | None) -> None:
        """Take a batch of an activation; entries that ``mask`` leaves out are padding."""
        spec, dynamic = self.view.spec, not self.view.is_static
        scale, zero = (
            spec.grid.qparams(*spec.granularity.range_of(value)) if dynamic else (self.view.range(program.module))
        )
        self._take(value, scale, zero, mask)
        if value.dim() > 1 and isinstance(self.view.value.meta["type"].shape[-1], int):
            low, high = (_ends(value, mask, end) for end in (math.inf, -math.inf))
            ends = torch.stack([low.amin(0), high.amax(0)])
            if self.channels is not None:
                ends = torch.stack([torch.minimum(ends[0], self.channels[0]), torch.maximum(ends[1], self.channels[1])])
            self.channels = ends
            width = value.shape[-1]
            if not dynamic and scale.dim() and 1 < scale.shape[-1] < width:
                self.groups = [index * scale.shape[-1] // width for index in range(width)]

    def _take(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, mask: torch.Tensor | None) -> None:
        grid, stored = self.view.spec.grid, self.view.is_static
        x, zero = x.detach().float(), torch.round(zero)
        codes = _codes(x, scale, zero)
        rounded = codes.clamp(grid.quant_min, grid.quant_max)
        error = numerics.values(rounded, scale, zero) - x
        outside = codes != rounded
        if stored:
            ends = ((grid.quant_min - zero) * scale).min(), ((grid.quant_max - zero) * scale).max()
            self.low, self.high = float(ends[0]), float(ends[1])
        if mask is not None:
            chosen = mask.expand_as(x)
            x, error, outside, rounded = (part[chosen] for part in (x, error, outside, rounded))
        self.count += x.numel()
        self.clipped += int(outside.sum())
        self.signal += float(x.double().square().sum())
        self.noise += float(error.double().square().sum())
        self.histogram.add(x)
        if grid.bits <= _COUNTED_BITS:
            levels = grid.quant_max - grid.quant_min + 1
            counts = torch.bincount((rounded.reshape(-1) - grid.quant_min).long(), minlength=levels)
            self.codes = counts if self.codes is None else self.codes + counts

    def _rewritten(
        self, before: torch.Tensor, now: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> dict[str, Any]:
        """How far passes moved a weight, and the share of its codes that are not the nearest to what it was."""
        grid = self.view.spec.grid
        first, last = (
            _codes(weight, scale, torch.round(zero)).clamp(grid.quant_min, grid.quant_max) for weight in (before, now)
        )
        size = float(before.double().norm())
        return {
            "distance": significant(float((now.double() - before.double()).norm()) / size) if size else None,
            "codes": significant(float((first != last).double().mean())),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data; floats have six significant digits."""
        quantizer, spec = self.view.quantizer, self.view.spec
        used = int((self.codes > 0).sum()) if self.codes is not None else None
        shape = self.histogram.to_dict()
        return {
            "tensor": quantizer.tensor,
            "role": quantizer.role,
            "path": str(self.view.node.meta.get("path", "")),
            "spec": str(spec),
            "bits": spec.grid.bits,
            "values": self.count,
            "share": significant(self.share),
            "minimum": significant(self.histogram.minimum),
            "maximum": significant(self.histogram.maximum),
            "low": significant(self.low),
            "high": significant(self.high),
            "clipped": significant(self.clipped / self.count),
            "sqnr_db": significant(10 * math.log10(self.signal / self.noise)) if self.noise and self.signal else None,
            "codes_used": used,
            "codes": spec.grid.quant_max - spec.grid.quant_min + 1,
            "histogram": {**shape, "start": significant(shape["start"]), "step": significant(shape["step"])},
            "channels": self._channels(),
            "tokens": self.tokens.to_dict(),
            "scales": spread(self.scales) if self.scales is not None and self.scales.numel() > 1 else None,
            "rewritten": self.rewritten,
        }

    def _channels(self) -> dict[str, Any] | None:
        """Least and greatest value of channels, sorted by width, at most :data:`~spread.PLACES` of them."""
        if self.channels is None:
            return None
        low, high = self.channels
        order = torch.argsort(high - low, stable=True).tolist()
        picked = [order[i] for i in even(len(order))]
        form: dict[str, Any] = {
            "count": len(order),
            "index": [i * self.step for i in picked],
            "low": [significant(float(low[i]), 4) for i in picked],
            "high": [significant(float(high[i]), 4) for i in picked],
        }
        if self.groups:
            form["group"] = [self.groups[i] for i in picked]
        return form


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes, as floats, before they are clipped."""
    return numerics.blockwise(x, scale, zero, lambda v, s, z: torch.round(v / s) + z)


def _same_parameter(program: Program, name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter ``name`` of ``program`` where it has the shape of ``weight``; None for none."""
    try:
        other = get_tensor(program.module, name).detach()
    except BitlowerError:
        return None
    return other if other.shape == weight.shape else None


def _ends(value: torch.Tensor, mask: torch.Tensor | None, neutral: float) -> torch.Tensor:
    """``value`` as rows of channels, with ``neutral`` where there is padding."""
    value = value.detach().float()
    if mask is not None:
        value = torch.where(mask, value, torch.tensor(neutral))
    return value.reshape(-1, value.shape[-1])
