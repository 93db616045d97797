"""SignRound (Cheng et al. 2023, as in AutoRound): learn rounding and clipping of weights, block by block, by sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx, nn

from bitlower.ir import BitlowerError, Level, Program, get_tensor
from bitlower.ir.dataflow import operand
from bitlower.ir.trainable import Trainable, make_trainable
from bitlower.passes._base import Context, Contract, Pass
from bitlower.passes._weights import WeightRanges, close_weights, open_weights
from bitlower.passes.quantize import PlacementReport
from bitlower.passes.training._block_data import BlockData, chosen_data
from bitlower.passes.training._block_loop import BlockReport, Outcome, Schedule, improve_blocks, learn
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._part import Part
from bitlower.passes.training._sign_round import SignRound
from bitlower.passes.training._teacher import float_reference


@dataclass(frozen=True)
class AutoroundReport(BlockReport):
    """What `autoround` did to every block."""


@dataclass(frozen=True)
class Autoround(Pass):
    """Rewrite the weights of linears inside repeated blocks to values on their grids, by what blocks give.

    For each weight a shift V of what is rounded, and clip factors of the range of each group, are learned by the sign
    of the gradient of the block's error (Cheng et al. 2023: 200 steps of 8 sequences, rate 1/steps, falling linearly).
    Open weight quantizers get grids first, so that the pass stands where `gptq` does; calibrated ones start from
    theirs. Tables, heads and norm weights with open quantizers are rounded to nearest. Activation quantizers stay as
    they are, open or not. Needs calibration data, part of which is held out: a block whose error there does not fall is
    rounded to nearest.
    """

    name: ClassVar[str] = "autoround"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    preserves: ClassVar[frozenset[type]] = frozenset({PlacementReport})
    iterations: int = 200
    """Steps a block."""
    batch: int = 8
    """Sequences a step, drawn at random."""
    learning_rate: float = 0.0
    """Of the first step, falling linearly to 0; 0 stands for 1/iterations, with which V can just reach its bounds."""
    inputs: Literal["quantized", "float"] = "quantized"
    """What a block gets: what the blocks before it give, which are rewritten already, or what the float ones give."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts, by the norm of the block's float output; ``none``: the published mean squared error."""
    ranges: WeightRanges = "minmax"
    """How grids are laid over weights with open quantizers before anything is learned."""
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
        """Rewrite the weights and leave an :class:`AutoroundReport`.

        Raises:
            BitlowerError: a parameter out of range, fewer than two calibration sequences, a model without repeated
                blocks, rounded weights without a float model to compare with, or values that are not finite.
        """
        _check(self)
        data = chosen_data(program, context, self.held_out, self.name)
        found = pairs(program, float_reference(program, context), self.name)
        close_weights(program.module, open_weights(program.module), self.ranges)
        walk = Walk(found, data.batches, self.inputs, self.memory, context.work)
        rows = improve_blocks(program, context, walk, data, self.weighting, self.name, self._improve)
        context.put(AutoroundReport(rows))
        return True

    def _improve(self, data: BlockData, generator: torch.Generator) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
        block = rounding_block(data.part)
        modules = {name: module for name, module in block.model.named_modules() if isinstance(module, SignRound)}
        parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        rate = self.learning_rate or 1 / self.iterations

        def update(share: float) -> None:
            for module in modules.values():
                module.update(rate * share)

        outcome = learn(data, block.model, parameters, update, Schedule(self.iterations, self.batch), generator)
        tensors: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            places = (block.weights[name], *block.stored[name])
            tensors |= dict(zip(places, module.rounded(get_tensor(block.model, places[0]).detach()), strict=True))
        return outcome, tensors


def rounding_block(part: Part) -> Trainable:
    """A block in which weights of linears that nothing else reads learn how they are rounded, and all else is fixed."""
    shared = part.shared()

    def make(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
        if node.meta["quantizer"].role != "linear-weight" or operand(node, 0).op != "get_attr":
            return None
        names = [str(operand(node, position).target) for position in range(3)]
        if shared.intersection(names):
            return None
        weight, scale, zero = (get_tensor(module, name).detach() for name in names)
        return SignRound(node.meta["quantizer"].spec, weight, scale, zero)

    block = make_trainable(part.module(), make)
    for name, parameter in block.model.named_parameters():
        parameter.requires_grad_(isinstance(block.model.get_submodule(name.rpartition(".")[0]), SignRound))
    return block


def _check(options: Autoround) -> None:
    """Refuse parameters that make no sense."""
    for name in ("iterations", "batch"):
        if getattr(options, name) < 1:
            raise BitlowerError(f"autoround: {name} is {getattr(options, name)}", hint="it must be at least 1")
    if not 0 <= options.learning_rate <= 1:
        raise BitlowerError(f"autoround: learning-rate is {options.learning_rate}", hint="it must lie in [0, 1]")
    if not 0 < options.held_out < 1:
        raise BitlowerError(f"autoround: held-out is {options.held_out}", hint="it must lie between 0 and 1")
