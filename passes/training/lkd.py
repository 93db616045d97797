"""Layer-by-layer knowledge distillation (ZeroQuant, Yao et al. 2022, §4): train one block after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from bitlower.ir import Batch, BitlowerError, Level, Program
from bitlower.ir.learnable import RangeSettings
from bitlower.ir.program import get_tensor
from bitlower.ir.tokens import token_mask
from bitlower.ir.trainable import Trainable, identity, learnable, make_trainable
from bitlower.passes._base import Context, Contract, Pass
from bitlower.passes.quantize import PlacementReport
from bitlower.passes.training._block_data import BlockData, Split, chosen_data
from bitlower.passes.training._block_loop import BlockReport, Outcome, Schedule, improve_blocks, learn
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._part import Part
from bitlower.passes.training._teacher import float_reference

RANGES = RangeSettings(parametrization="log", gradient_scale="plain")
"""Scales learn as logarithms: a rate is a relative change a step, for weights and activations of any size."""


@dataclass(frozen=True)
class LkdReport(BlockReport):
    """What `lkd` did to every block."""


@dataclass(frozen=True)
class Lkd(Pass):
    """Train weights, norms, biases and ranges of one repeated block after another to give what the float block gives.

    The published method (ZeroQuant §4 and its code) gives each block 100 steps of AdamW with 32 sequences of 128 tokens
    and the rate 5e-6 for encoders, 1600 steps of 8 sequences of 2048 tokens and 1e-6 to 5e-6 for decoders; the inputs
    are those of the float model (``inputs: float``), all tokens count the same (``weighting: none``), ranges follow the
    weights, and weights decay by 0.01. Here rates fall linearly to 0, nothing decays, and ranges learn.

    Every quantizer in the blocks has its range already: the pass stands after `calibrate`, `gptq` or `rtn`. Needs
    calibration data, part of which is held out: a block whose error there does not fall keeps what it had. Tensors that
    something outside the block reads too stay.
    """

    name: ClassVar[str] = "lkd"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    preserves: ClassVar[frozenset[type]] = frozenset({PlacementReport})
    iterations: int = 200
    """Steps a block."""
    batch: int = 8
    """Sequences a step, drawn at random."""
    learning_rate: float = 1e-4
    """Of weights, norms and biases, at the first step; it falls linearly to 0."""
    scale_learning_rate: float = 1e-3
    """Of the logarithms of scales, and of zero points in codes; 0 leaves ranges as they are."""
    inputs: Literal["quantized", "float"] = "quantized"
    """What a block gets: what the blocks before it give, which are trained already, or what the float ones give."""
    data: Literal["calibration", "random"] = "calibration"
    """What is learned on; ``random`` puts random tokens in the place of the texts' (ZeroQuant, table 10). What is held
    out is text."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts, by the norm of the block's float output; ``none``: the published mean squared error."""
    held_out: float = 0.125
    """The share of the sequences that are not learned on."""
    memory: int = 2 << 30
    """Bytes of values between blocks that are held in memory; more go to disk."""

    def data_runs(self, program: Program) -> int:
        """The float and the quantized blocks; learning is not counted."""
        return 2

    def trains(self) -> bool:
        """Block by block."""
        return True

    def training_steps(self, batches: int) -> int:
        """Those of each block."""
        return self.iterations

    def run(self, program: Program, context: Context) -> bool:
        """Train the blocks and leave an :class:`LkdReport`.

        Raises:
            BitlowerError: a parameter out of range, fewer than two calibration sequences, a model without repeated
                blocks, a quantizer without a range, rounded weights without a float model to compare with, random
                tokens for a model that reads none, or values that are not finite.
        """
        _check(self)
        data = chosen_data(program, context, self.held_out, self.name)
        if self.data == "random":
            data = random_tokens(program, data, context.generator(f"{self.name}/tokens"))
        found = pairs(program, float_reference(program, context), self.name)
        walk = Walk(found, data.batches, self.inputs, self.memory, context.work)
        rows = improve_blocks(program, context, walk, data, self.weighting, self.name, self._improve)
        context.put(LkdReport(rows))
        return any(row.step for row in rows)

    def _improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        block = trained_block(data.part)
        groups = parameter_groups(block, data.part, self.learning_rate, self.scale_learning_rate)
        parameters = [parameter for group, _ in groups for parameter in group]
        rates = [rate for _, rate in groups]
        optimizer = torch.optim.AdamW([{"params": group, "lr": rate} for group, rate in groups], weight_decay=0.0)

        def update(share: float) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            optimizer.step()

        outcome = learn(data, block.model, parameters, update, Schedule(self.iterations, self.batch), generator)
        return outcome, block.changed(data.part.program.module) if outcome.step else {}


def trained_block(part: Part) -> Trainable:
    """A block by itself, with tensors of its own.

    Raises:
        BitlowerError: one of its quantizers is not calibrated.
    """
    return make_trainable(part.module(), lambda module, node: learnable(module, node, RANGES))


def parameter_groups(
    block: Trainable, part: Part, rate: float, scale_rate: float
) -> list[tuple[list[nn.Parameter], float]]:
    """The parameters of a block that learn, with their rates: what only the block reads, first weights, then ranges."""
    module, shared = part.program.module, part.shared()
    fixed = {identity(get_tensor(module, name)) for name in shared}
    ranges: dict[int, bool] = {}
    for name, quantizer in block.quantizers().items():
        free = all(identity(get_tensor(module, stored)) not in fixed for stored in block.stored[name])
        ranges |= {id(parameter): free for parameter in quantizer.parameters()}
    weights: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in block.model.named_parameters():
        is_range = id(parameter) in ranges
        free = ranges[id(parameter)] if is_range else name not in shared
        parameter.requires_grad_(free and (scale_rate if is_range else rate) > 0)
        if parameter.requires_grad:
            (scales if is_range else weights).append(parameter)
    return [(group, value) for group, value in ((weights, rate), (scales, scale_rate)) if group]


def random_tokens(program: Program, data: Split, generator: torch.Generator) -> Split:
    """``data`` with random tokens of the vocabulary where it is learned on; held-out batches stay.

    Padding stays, and the first token where all sequences begin with the same.

    Raises:
        BitlowerError: the model reads no tokens.
    """
    size = program.config.get("vocab_size")
    if not isinstance(size, int) or any("input_ids" not in batch for batch in data.batches):
        raise BitlowerError(
            "lkd: random tokens need a model with `input_ids` and a vocabulary", hint="data=calibration"
        )
    learned = data.batches[: data.learned]
    first = {int(token) for batch in learned for token in _first_tokens(batch)}
    replaced = [_randomized(batch, size, len(first) == 1, generator) for batch in learned]
    return Split(replaced + data.batches[data.learned :], data.learned, data.cut)


def _first_tokens(batch: Batch) -> Sequence[int]:
    """The first token of each sequence that is no padding."""
    ids, mask = batch["input_ids"], token_mask(batch)
    first = mask.int().argmax(1) if mask is not None else torch.zeros(len(ids), dtype=torch.int64)
    return [int(token) for token in ids.gather(1, first[:, None])]


def _randomized(batch: Batch, size: int, keep_first: bool, generator: torch.Generator) -> Batch:
    ids, mask = batch["input_ids"], token_mask(batch)
    real = mask if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    change = real & (real.cumsum(1) > 1) if keep_first else real
    drawn = torch.randint(0, size, ids.shape, generator=generator, dtype=ids.dtype)
    return {**batch, "input_ids": torch.where(change, drawn, ids)}


def _check(options: Lkd) -> None:
    """Refuse parameters that make no sense."""
    for name in ("iterations", "batch"):
        if getattr(options, name) < 1:
            raise BitlowerError(f"lkd: {name} is {getattr(options, name)}", hint="it must be at least 1")
    for name in ("learning_rate", "scale_learning_rate"):
        if getattr(options, name) < 0:
            raise BitlowerError(f"lkd: {name.replace('_', '-')} is {getattr(options, name)}", hint="at least 0")
    if options.learning_rate == options.scale_learning_rate == 0:
        raise BitlowerError("lkd: both learning rates are 0", hint="set one of them")
    if not 0 < options.held_out < 1:
        raise BitlowerError(f"lkd: held-out is {options.held_out}", hint="it must lie between 0 and 1")
