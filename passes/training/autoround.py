"""SignRound (Cheng et al. 2023, as in AutoRound): learn rounding and clipping of weights, block by block, by sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from bitlower.ir import BitlowerError, Program, get_tensor
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.trainable import Trainable, make_trainable
from bitlower.ir.weight_ranges import WeightRanges, calibrate_weights, uncalibrated_weights
from bitlower.passes._machinery.base import Context
from bitlower.passes.training._block_data import BlockData, BlockSplit
from bitlower.passes.training._block_loop import BlockReport, Outcome, learn
from bitlower.passes.training._block_training import BlockTraining
from bitlower.passes.training._part import Part
from bitlower.passes.training._sign_round import SignRound


@dataclass(frozen=True)
class AutoroundReport(BlockReport):
    """What `autoround` did to every block."""


@dataclass(frozen=True)
class Autoround(BlockTraining):
    """Rewrite the weights of linears inside repeated blocks to values on their grids, by what blocks give.

    For each weight a shift V of what is rounded, and clip factors of the range of each group, are learned by the sign
    of the gradient of the block's error (Cheng et al. 2023: 200 steps of 8 sequences, rate 1/steps, falling linearly).
    Uncalibrated weight quantizers get grids first, so that the pass stands where `gptq` does; calibrated ones start
    from theirs. Tables, heads and norm weights with uncalibrated quantizers are rounded to nearest. Activation
    quantizers stay as they are, calibrated or not. Needs calibration data, part of which is held out: a block whose
    error there does not fall is rounded to nearest.
    """

    name: ClassVar[str] = "autoround"
    ranges: WeightRanges = "minmax"
    """How grids are laid over weights with uncalibrated quantizers before anything is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate == 0:
            raise BitlowerError("autoround: learning-rate is 0.0", hint="it must be above 0; `rtn` learns nothing")

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite the weights and leave an :class:`AutoroundReport`.

        Raises:
            BitlowerError: as :meth:`BlockTraining.train` says.
        """
        context.put(AutoroundReport(self.train(program, context)))
        return True

    def prepare(self, program: Program, context: Context, data: BlockSplit) -> BlockSplit:
        """Give uncalibrated weight quantizers their grids."""
        calibrate_weights(program.module, uncalibrated_weights(program.module), self.ranges)
        return data

    def improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        """Let rounding and ranges of a block learn."""
        block = rounding_block(data.part)
        modules = {name: module for name, module in block.model.named_modules() if isinstance(module, SignRound)}
        parameters = [parameter for module in modules.values() for parameter in module.parameters()]

        def update(share: float) -> None:
            for module in modules.values():
                module.update(self.rate * share)

        outcome = learn(data, block.model, parameters, update, self.schedule, generator)
        tensors: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            places = (block.weights[name], *block.stored[name])
            tensors |= dict(zip(places, module.rounded(get_tensor(block.model, places[0]).detach()), strict=True))
        return outcome, tensors


def rounding_block(part: Part) -> Trainable:
    """A block in which weights of linears that nothing else reads learn how they are rounded, and all else is fixed."""
    shared = part.shared()

    def make(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
        view = QuantizerNode(node)
        if view.quantizer.role != "linear-weight" or not view.rounds_parameter:
            return None
        if shared.intersection((view.parameter, *view.stored)):
            return None
        return SignRound(view.spec, view.weight(module), *view.range(module))

    block = make_trainable(part.module(), make)
    for name, parameter in block.model.named_parameters():
        parameter.requires_grad_(isinstance(block.model.get_submodule(name.rpartition(".")[0]), SignRound))
    return block
