"""Weights on an integer grid by learned rounding: up or down, whichever serves a layer's output (Nagel et al. 2020).

Nothing here knows models or graphs. A weight becomes ``scale · (clamp(⌊w / scale⌋ + h(α) + zero) − zero)`` with the
rectified sigmoid ``h(α) = clip(1.2 σ(α) − 0.1, 0, 1)`` (eq. 21–23), one α a weight; a regularizer drives each h to 0 or
1 (eq. 24). Errors are counted in units of what rounding a weight to nearest costs on average: the published sum of raw
errors would make the regularizer all or nothing, as the scale of the layer's inputs has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from bitlower.ir.quantization import numerics

STRETCH = (-0.1, 1.1)
"""γ and ζ: how far the sigmoid reaches beyond 0 and 1."""
BETAS = (20.0, 2.0)
"""The regularizer's exponent, at the end of the warm-up and at the end."""
CHECKS = 10
"""How often the hard-rounded weight is looked at on all tokens."""
_CHUNK = 4096
"""Tokens whose outputs are computed at a time where all are looked at."""

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AdaroundOptions:
    """How rounding is learned; see :class:`~bitlower.passes.rounding.adaround.Adaround`."""

    iterations: int
    learning_rate: float
    batch: int
    regularization: float
    warmup: float


@dataclass(frozen=True)
class AdaroundLayer:
    """One layer's rounding problem.

    Args:
        weight: ``[out, in]`` float32.
        bias: ``[out]``, or None.
        activation: what follows the layer, elementwise; the identity where nothing is looked through.
        scale: of the weight's grid, laid out as its granularity says.
        zero: its zero points.
        limits: the smallest and the largest code.
        inputs: ``[tokens, in]``, as the quantized layers before it give them.
        targets: ``[tokens, out]``: what the float layer gives for float inputs, behind ``activation``.
        weights: ``[tokens]``: how much each token counts, 1 on average.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: Function
    scale: torch.Tensor
    zero: torch.Tensor
    limits: tuple[int, int]
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def spread(self, part: torch.Tensor) -> torch.Tensor:
        """A scale or zero point for each weight."""
        return numerics.blockwise(torch.ones_like(self.weight), part, part, lambda one, value, _: one * value)

    def output(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the layer returns with ``weight`` in the place of its own."""
        return self.activation(functional.linear(inputs, weight, self.bias))

    def row_losses(self, weight: torch.Tensor) -> torch.Tensor:
        """The squared error of each output, weighted mean over tokens, ``[out]`` float64."""
        total = torch.zeros(len(weight), dtype=torch.float64)
        parts = (torch.split(part, _CHUNK) for part in (self.inputs, self.targets, self.weights))
        for inputs, targets, weights in zip(*parts, strict=True):
            total += (weights @ (self.output(inputs, weight) - targets).square_()).double()
        return total / len(self.inputs)


@dataclass(frozen=True)
class Rounded:
    """What was found.

    Args:
        codes: ``[out, in]`` whole numbers, float32.
        loss: squared error of each output, weighted mean over tokens, ``[out]`` float64.
        nearest_loss: the same for round-to-nearest on the same grid.
        flipped: how many codes are not the nearest.
        nearest_rows: how many outputs kept all of theirs nearest because nothing did better.
    """

    codes: torch.Tensor
    loss: torch.Tensor
    nearest_loss: torch.Tensor
    flipped: int
    nearest_rows: int


class SoftWeight:
    """A weight whose rounding is open: what is learned is α, ``[out, in]``."""

    def __init__(self, layer: AdaroundLayer) -> None:
        self._scale, self._zero = layer.spread(layer.scale), layer.spread(layer.zero)
        self._limits = layer.limits
        ratio = layer.weight / self._scale
        self._floor = torch.floor(ratio)
        low, high = STRETCH
        fraction = ratio - self._floor
        self.alpha = torch.log((fraction - low) / (high - fraction)).requires_grad_()

    def share(self) -> torch.Tensor:
        """h(α): how far each weight is rounded up, 0 to 1."""
        low, high = STRETCH
        return (torch.sigmoid(self.alpha) * (high - low) + low).clamp(0, 1)

    def soft(self, share: torch.Tensor) -> torch.Tensor:
        """The weight with each code between its two neighbours, as ``share`` says."""
        code = (self._floor + share + self._zero).clamp(*self._limits)
        return (code - self._zero) * self._scale

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """Hard codes: up where α ≥ 0."""
        return (self._floor + (self.alpha >= 0) + self._zero).clamp(*self._limits)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weight of ``codes``."""
        return (codes - self._zero) * self._scale


def solve(layer: AdaroundLayer, options: AdaroundOptions, generator: torch.Generator) -> Rounded:
    """Learn the rounding of ``layer``.

    The best hard-rounded weight that was seen is kept, output by output (outputs do not depend on one another);
    round-to-nearest is among what was seen, so none is ever worse than it.
    """
    soft = SoftWeight(layer)
    nearest = numerics.codes(layer.weight, layer.scale, layer.zero, *layer.limits)
    nearest_loss = layer.row_losses(soft.values(nearest))
    best, loss = nearest.clone(), nearest_loss.clone()
    unit = float(nearest_loss.sum()) / nearest.numel()
    optimizer = torch.optim.Adam([soft.alpha], lr=options.learning_rate)
    for step in range(options.iterations if unit else 0):
        index = torch.randint(len(layer.inputs), (options.batch,), generator=generator)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_now = _objective(layer, soft, index, unit, exponent(step, options), options.regularization)
            loss_now.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) * CHECKS // options.iterations > step * CHECKS // options.iterations:
            codes = soft.codes()
            candidate_loss = layer.row_losses(soft.values(codes))
            better = candidate_loss < loss
            best[better], loss[better] = codes[better], candidate_loss[better]
    flipped = best != nearest
    return Rounded(best, loss, nearest_loss, int(flipped.sum()), int((~flipped.any(1)).sum()))


def exponent(step: int, options: AdaroundOptions) -> float | None:
    """The regularizer's exponent β, which falls as a cosine from 20 to 2; None before the warm-up's end."""
    start = options.warmup * options.iterations
    if step < start:
        return None
    first, last = BETAS
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * (step - start) / (options.iterations - start)))


def _objective(
    layer: AdaroundLayer, soft: SoftWeight, index: torch.Tensor, unit: float, beta: float | None, regularization: float
) -> torch.Tensor:
    """Squared error in units, summed over outputs, mean over tokens, and ``λ · Σ (1 − |2h − 1|^β)`` (eq. 25)."""
    share = soft.share()
    error = layer.output(layer.inputs[index], soft.soft(share)) - layer.targets[index]
    loss = (error.square().sum(1) * layer.weights[index]).mean() / unit
    if beta is None:
        return loss
    return loss + regularization * (1 - (2 * share - 1).abs().pow(beta)).sum()
