"""The data that one block learns on: sequences to draw from, held-out ones, and the error of a block on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.storage import release
from bitlower.ir.token_weights import token_weights
from bitlower.ir.tokens import BATCH, value_mask
from bitlower.passes._machinery.base import Context
from bitlower.passes.training._blocks import BlockStep
from bitlower.passes.training._part import Part

TOKENS = 4096
"""So many tokens at most are run at once with gradients; more are added up."""

Unit = tuple[int, int | None]
"""A batch and one of its sequences; None: the whole batch, where a model's batches cannot be cut."""


@dataclass(frozen=True)
class BlockSplit:
    """Batches to learn on and then held-out ones.

    Args:
        batches: all of them.
        learned: how many are to be learned on; the others follow.
        cut: whether a sequence can be taken out of a batch.
    """

    batches: list[Batch]
    learned: int
    cut: bool

    def units(self) -> tuple[list[Unit], list[Unit]]:
        """What can be drawn from: sequences to learn on, and held-out batches."""
        rows = [_rows(batch) if self.cut else 1 for batch in self.batches]
        learned: list[Unit] = [(i, row if self.cut else None) for i in range(self.learned) for row in range(rows[i])]
        return learned, [(index, None) for index in range(self.learned, len(rows))]


def chosen_data(program: Program, context: Context, share: float, name: str) -> BlockSplit:
    """What the pass ``name`` learns on and what it holds out: training data if there are, else calibration data.

    Raises:
        BitlowerError: there are no two sequences.
    """
    batches = [_inputs(batch) for batch in context.training or context.calibration]
    cut = all(spec.type.shape and spec.type.shape[0] == "batch" for spec in program.inputs)
    if context.training and context.held_out:
        return BlockSplit([*batches, *map(_inputs, context.held_out)], len(batches), cut)
    return split(batches, share, cut=cut, name=name)


def _inputs(batch: Batch) -> Batch:
    """Without labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def split(batches: Sequence[Batch], share: float, *, cut: bool, name: str) -> BlockSplit:
    """Hold out a share of the sequences, evenly over the data, at least one and not all.

    Raises:
        BitlowerError: there are no two sequences.
    """
    count = sum(_rows(batch) if cut else 1 for batch in batches)
    if count < 2:
        raise BitlowerError(
            f"{name} needs two sequences of calibration data at least, not {count}: one is held out",
            hint="give more calibration data",
        )
    held_out_count = max(1, min(count - 1, round(count * share)))
    out = {int((i + 0.5) * count / held_out_count) for i in range(held_out_count)}
    learned: list[Batch] = []
    held_out: list[Batch] = []
    start = 0
    for batch in batches:
        rows = _rows(batch) if cut else 1
        chosen = torch.tensor([start + row in out for row in range(rows)])
        start += rows
        for group, mask in ((learned, ~chosen), (held_out, chosen)):
            if bool(mask.any()):
                group.append({name: value[mask] for name, value in batch.items()} if cut else batch)
    return BlockSplit(learned + held_out, len(learned), cut)


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


@dataclass(frozen=True)
class Pick:
    """Some sequences of one shape: inputs of the model and of the block, its context, its targets, tokens' weights."""

    batch: Batch
    inputs: torch.Tensor
    context: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass
class BlockData:
    """What one block learns on.

    The error of a block is ``Σ w ‖ŷ − y‖² / Σ w ‖y‖²`` over tokens that are no padding, with y its float output.

    Args:
        step: the block with its inputs and targets.
        data: the batches behind them.
        weighting: how much a token counts, by ``‖y‖²``.
    """

    step: BlockStep
    data: BlockSplit
    weighting: str
    learned: list[Unit] = field(init=False)
    held_out: list[Unit] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)
    energies: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.learned, self.held_out = self.data.units()
        norms, masks = [], []
        shape = self.part.output.meta["type"].shape
        for target, batch in zip(self.step.targets, self.data.batches, strict=True):
            keep = value_mask(shape, batch)
            full = torch.ones(target.shape[:-1], dtype=torch.bool)
            masks.append(full if keep is None else keep.expand(*target.shape[:-1], 1)[..., 0])
            norms.append(target.square().sum(-1))
            release(target)
        weights = token_weights(torch.cat([n[m] for n, m in zip(norms, masks, strict=True)]), self.weighting)
        counts = [int(mask.sum()) for mask in masks]
        self.weights = [
            torch.zeros(mask.shape).masked_scatter(mask, part)
            for mask, part in zip(masks, torch.split(weights, counts), strict=True)
        ]
        self.energies = [
            (weight * norm.masked_fill(~mask, 0.0)).double()
            for weight, norm, mask in zip(self.weights, norms, masks, strict=True)
        ]
        self.tokens = sum(counts[: self.data.learned])

    @property
    def part(self) -> Part:
        """The block."""
        return self.step.part

    def draw(self, count: int, generator: torch.Generator) -> list[Unit]:
        """So many sequences to learn on, at random, none of them twice."""
        order = torch.randperm(len(self.learned), generator=generator)[:count]
        return [self.learned[index] for index in order.tolist()]

    def held_out_error(self, model: nn.Module) -> float:
        """The error on held-out data."""
        with torch.no_grad():
            total = sum(float(self.error(model, pick).double()) for pick in self.picks(self.held_out))
        return total / self._energy(self.held_out)

    def backward(self, model: nn.Module, units: Sequence[Unit]) -> float:
        """The error on ``units``; its gradient is added to that of the model's parameters."""
        energy, total = self._energy(units), 0.0
        for pick in self.picks(units):
            error = self.error(model, pick) / energy
            error.backward()  # type: ignore[no-untyped-call]
            total += float(error.detach())
        return total

    def error(self, model: nn.Module, pick: Pick) -> torch.Tensor:
        """``Σ w ‖ŷ − y‖²`` on some sequences."""
        [output] = model(pick.inputs, *pick.context, *self.part.side_values(pick.batch))
        used = pick.weights > 0
        total: torch.Tensor = (pick.weights[used] * (output[used] - pick.targets[used]).square().sum(-1)).sum()
        return total

    def picks(self, units: Sequence[Unit]) -> Iterator[Pick]:
        """The sequences of ``units``, those of one shape together as long as they are few enough to be run at once."""
        alike = defaultdict[object, list[Unit]](list)
        for batch, row in units:
            shapes = tuple(value.shape[1:] for value in self.data.batches[batch].values())
            alike[(batch, None) if row is None else shapes].append((batch, row))
        for members in alike.values():
            first, row = members[0]
            tokens = self.weights[first].numel() // (1 if row is None else len(self.weights[first]))
            size = max(1, TOKENS // max(1, tokens))
            for start in range(0, len(members), size):
                yield self._pick(members[start : start + size])

    def _pick(self, units: Sequence[Unit]) -> Pick:
        batches = self.data.batches
        inputs = {name: _joined(units, [batch.get(name) for batch in batches]) for name in batches[units[0][0]]}
        targets, weights = _joined(units, self.step.targets), _joined(units, self.weights)
        return Pick(inputs, _joined(units, self.step.inputs), self._context(units), targets, weights)

    def _context(self, units: Sequence[Unit]) -> tuple[torch.Tensor, ...]:
        """The values of the block's context; one without a dimension of sequences is that of them all."""
        whole = [(units[0][0], None)]
        rows = [node.meta["type"].shape[:1] == (BATCH,) for node in self.part.context]
        pairs = zip(rows, self.step.context, strict=True)
        return tuple(_joined(units if of_sequences else whole, values) for of_sequences, values in pairs)

    def _energy(self, units: Sequence[Unit]) -> float:
        energies = [self.energies[batch] if row is None else self.energies[batch][row] for batch, row in units]
        return max(sum(float(part.sum()) for part in energies), torch.finfo(torch.float32).tiny)


def _joined(units: Sequence[Unit], values: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The values of some sequences, one after another; ``values`` are those of the batches."""
    parts = []
    for batch, row in units:
        value = values[batch]
        assert value is not None
        parts.append(value.clone() if row is None else value[row : row + 1].clone())
        release(value)
    return torch.cat(parts) if len(parts) > 1 else parts[0]
