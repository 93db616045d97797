"""Layer-by-layer knowledge distillation (ZeroQuant, Yao et al. 2022, §4): train one block after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import nn

from bitlower.ir import BitlowerError, Program
from bitlower.ir.learnable import RangeSettings
from bitlower.ir.tensors import get_tensor
from bitlower.ir.tokens import ENCODER_SEQUENCE, SEQUENCE, TARGET, TOKENS, token_mask
from bitlower.ir.trainable import Trainable, identity, learnable, make_trainable
from bitlower.passes._machinery.base import Context
from bitlower.passes.training._block_data import BlockData, BlockSplit
from bitlower.passes.training._block_loop import BlockReport, Outcome, learn
from bitlower.passes.training._block_training import BlockTraining
from bitlower.passes.training._part import Part

RANGES = RangeSettings(parametrization="log", gradient_scale="plain")
"""Scales learn as logarithms: a rate is a relative change a step, for weights and activations of any size."""
FLOAT_STEP = 0.05
"""The step that a parameter learns by that is on no grid, relative to its mean magnitude."""


@dataclass(frozen=True)
class LkdReport(BlockReport):
    """What `lkd` did to every block."""


@dataclass(frozen=True)
class Lkd(BlockTraining):
    """Train weights, norms, biases and ranges of one repeated block after another to give what the float block returns.

    The published method (ZeroQuant §4 and its code) gives each block 100 steps of AdamW with 32 sequences of 128 tokens
    and the rate 5e-6 for encoders, 1600 steps of 8 sequences of 2048 tokens and 1e-6 to 5e-6 for decoders; the inputs
    are those of the float model (``inputs: float``), all tokens count the same (``weighting: none``), ranges follow the
    weights, and weights decay by 0.01. Here rates are in steps of each weight's grid and fall linearly to 0, nothing
    decays, and ranges learn. Norms, biases and weights that nothing rounds move as if they lay on a grid of 20 steps in
    their mean magnitude; one that is all zeros stays.

    Every quantizer in the blocks has its range already: the pass stands after `calibrate`, `gptq` or `rtn`. Needs
    calibration data, part of which is held out: a block whose error there does not fall keeps what it had. Tensors that
    something outside the block reads too stay.
    """

    name: ClassVar[str] = "lkd"
    scale_learning_rate: Annotated[float, Ge(0)] = 1e-3
    """Of the logarithms of scales, and of zero points in codes; 0 leaves ranges as they are."""
    data: Literal["calibration", "random"] = "calibration"
    """What is learned on; ``random`` puts random tokens in the place of the texts' (ZeroQuant, table 10). What is held
    out is text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate == self.scale_learning_rate == 0:
            raise BitlowerError("lkd: both learning rates are 0", hint="set one of them")

    def run(self, program: Program, context: Context) -> bool:
        """Train the blocks and leave an :class:`LkdReport`.

        Raises:
            BitlowerError: as :meth:`BlockTraining.train` says; a quantizer without a range, or random tokens for a
                model that reads none.
        """
        rows = self.train(program, context)
        context.put(LkdReport(rows))
        return any(row.step for row in rows)

    def prepare(self, program: Program, context: Context, data: BlockSplit) -> BlockSplit:
        """Draw random tokens, if those are asked for."""
        return random_tokens(program, data, context.generator("lkd/tokens")) if self.data == "random" else data

    def improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        """Let all that only the block reads learn."""
        block = trained_block(data.part)
        groups = parameter_groups(block, data.part, self.rate, self.scale_learning_rate)
        optimizer = torch.optim.AdamW([{"params": [p], "lr": own} for p, own in groups], lr=0.0, weight_decay=0.0)

        def update(share: float) -> None:
            for group, (_, own) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = own * share
            optimizer.step()

        outcome = learn(data, block.model, [p for p, _ in groups], update, self.schedule, generator)
        return outcome, block.changed(data.part.program.module) if outcome.step else {}


def trained_block(part: Part) -> Trainable:
    """A block by itself, with tensors of its own.

    Raises:
        BitlowerError: one of its quantizers is not calibrated.
    """
    return make_trainable(part.module(), lambda module, node: learnable(module, node, RANGES))


def parameter_groups(block: Trainable, part: Part, rate: float, scale_rate: float) -> list[tuple[nn.Parameter, float]]:
    """The parameters of a block that learn, with their rates: what only the block reads."""
    module, shared = part.program.module, part.shared()
    fixed = {identity(get_tensor(module, name)) for name in shared}
    ranges = dict[int, bool]()
    steps = {id(p): FLOAT_STEP * float(p.detach().abs().mean()) for p in block.model.parameters()}
    for name, quantizer in block.quantizers().items():
        free = all(identity(get_tensor(module, stored)) not in fixed for stored in block.stored[name])
        ranges |= {id(parameter): free for parameter in quantizer.parameters()}
        if (weight := block.weight_of(name)) is not None:
            steps[id(weight)] = float(quantizer.scale.mean())
    groups = []
    for name, parameter in block.model.named_parameters():
        is_range = id(parameter) in ranges
        free = ranges[id(parameter)] if is_range else name not in shared
        own = scale_rate if is_range else rate * steps[id(parameter)]
        parameter.requires_grad_(free and own > 0)
        if parameter.requires_grad:
            groups.append((parameter, own))
    return groups


def random_tokens(program: Program, data: BlockSplit, generator: torch.Generator) -> BlockSplit:
    """``data`` with random tokens of the vocabulary where it is learned on; held-out batches stay.

    Padding stays, and the first token where all sequences begin with the same.

    Raises:
        BitlowerError: the model reads no tokens.
    """
    size = program.config.get("vocab_size")
    if not isinstance(size, int) or any(TOKENS not in batch for batch in data.batches):
        raise BitlowerError(
            "lkd: random tokens need a model with `input_ids` and a vocabulary", hint="data=calibration"
        )
    replaced = data.batches[: data.learned]
    texts = {TOKENS: ENCODER_SEQUENCE, TARGET: SEQUENCE} if TARGET in replaced[0] else {TOKENS: SEQUENCE}
    for name, dim in texts.items():
        first = {int(token) for batch in replaced for token in _first_tokens(batch[name], token_mask(batch, dim))}
        keep = len(first) == 1
        replaced = [
            {**batch, name: _randomized(batch[name], token_mask(batch, dim), size, keep, generator)}
            for batch in replaced
        ]
    return BlockSplit(replaced + data.batches[data.learned :], data.learned, data.cut)


def _first_tokens(ids: torch.Tensor, mask: torch.Tensor | None) -> Sequence[int]:
    """The first token of each sequence that is no padding."""
    first = mask.int().argmax(1) if mask is not None else torch.zeros(len(ids), dtype=torch.int64)
    return [int(token) for token in ids.gather(1, first[:, None])]


def _randomized(
    ids: torch.Tensor, mask: torch.Tensor | None, size: int, keep_first: bool, generator: torch.Generator
) -> torch.Tensor:
    real = mask if mask is not None else torch.ones_like(ids, dtype=torch.bool)
    change = real & (real.cumsum(1) > 1) if keep_first else real
    drawn = torch.randint(0, size, ids.shape, generator=generator, dtype=ids.dtype)
    return torch.where(change, drawn, ids)
