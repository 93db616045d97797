"""Errors of outputs, summed batch by batch and part by part, so that no copy of a batch's logits is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitlower.ir import CheckError, Program

Array = np.ndarray[Any, Any]
NOISE = 2.0
"""Where no activation has codes, errors add up from layer to layer: then so many times what
:func:`~bitlower.ir.float_noise.shaken` shows may be there too. A 30-layer decoder whose residual stream holds values of
10⁴ shows 3e-4 on random tokens."""
_PART = 1 << 20


@dataclass(frozen=True)
class OutputError:
    """How far an output of the runtime is from the Program's.

    Args:
        name: of the output.
        worst: the largest absolute error.
        mean: the mean absolute error.
        relative: ``worst`` over the standard deviation of the output.
        cosine: of both outputs, flattened.
        given_codes: as ``relative``, for a Program that computes with the runtime's codes: what is left is float
            arithmetic alone, without the flips at rounding ties that quantization makes visible.
    """

    name: str
    worst: float
    mean: float
    relative: float
    cosine: float
    given_codes: float


@dataclass
class Sums:
    """What two tensors, seen in parts, have in common: the first is the Program's, the second the runtime's."""

    count: int = 0
    worst: float = 0.0
    absolute: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    theirs: float = 0.0
    product: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take parts of both: flat, in float64, not empty."""
        error = (a - b).abs()
        self.count += a.numel()
        self.worst = max(self.worst, largest(error))
        self.absolute += float(error.sum())
        self.total += float(a.sum())
        self.squares += float(a @ a)
        self.theirs += float(b @ b)
        self.product += float(a @ b)

    @property
    def mean(self) -> float:
        """The mean absolute error."""
        return self.absolute / self.count

    @property
    def deviation(self) -> float:
        """The standard deviation of the Program's output; its size where it is constant."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean**2
        return math.sqrt(variance) if variance > 1e-12 * mean**2 else abs(mean) or 1.0

    @property
    def cosine(self) -> float:
        """Of both, flattened."""
        return self.product / (math.sqrt(self.squares * self.theirs) or 1.0)


class OutputComparison:
    """Compares the outputs of the runtime with those of the Program."""

    def __init__(self, program: Program) -> None:
        self._sums = {spec.name: Sums() for spec in program.outputs}
        self._given = dict.fromkeys(self._sums, 0.0)

    def add(
        self,
        ours: Mapping[str, torch.Tensor],
        theirs: Mapping[str, Array],
        visible: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """One batch, both on their own; of the outputs in ``visible``, only where it is true.

        Raises:
            CheckError: an output has another shape, or is not finite where the Program's is.
        """
        for name, sums in self._sums.items():
            for a, b in _pairs(name, ours[name], theirs[name], visible):
                sums.add(a, b)

    def add_given_codes(
        self,
        ours: Mapping[str, torch.Tensor],
        theirs: Mapping[str, Array],
        visible: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """The same batch, the Program with the runtime's codes.

        Raises:
            CheckError: as :meth:`add`.
        """
        for name in self._sums:
            for a, b in _pairs(name, ours[name], theirs[name], visible):
                self._given[name] = max(self._given[name], largest((a - b).abs()))

    def rows(self) -> tuple[OutputError, ...]:
        """A row for each output that was compared."""
        return tuple(
            OutputError(
                name=name,
                worst=sums.worst,
                mean=sums.mean,
                relative=sums.worst / sums.deviation,
                cosine=sums.cosine,
                given_codes=self._given[name] / sums.deviation,
            )
            for name, sums in self._sums.items()
            if sums.count
        )


def largest(error: torch.Tensor) -> float:
    """The largest entry; infinity where one is not a number."""
    worst = float(error.max())
    return math.inf if math.isnan(worst) else worst


def flat_parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, flat, in parts."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PART):
        yield tuple(tensor[start : start + _PART] for tensor in flat)


def _pairs(
    name: str, ours: torch.Tensor, theirs: Array, visible: Mapping[str, torch.Tensor] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in float64, in parts, without the entries that do not count and those that are infinite or NaN in both."""
    other = torch.from_numpy(theirs)
    if ours.shape != other.shape:
        raise CheckError(f"the output {name} has the shape {list(other.shape)}, the program's {list(ours.shape)}")
    chosen = [visible[name].expand_as(ours)] if visible is not None and name in visible else []
    for a, b, *counts in flat_parts(ours, other, *chosen):
        a, b = a.double(), b.double()
        if counts:
            a, b = a[counts[0]], b[counts[0]]
        both = a.isfinite() & b.isfinite()
        alike = (a == b) | (a.isnan() & b.isnan())
        if not bool((both | alike).all()):
            raise CheckError(f"the output {name} is not finite where the program's is, or the other way round")
        if not bool(both.all()):  # picking takes longer than all else here
            a, b = a[both], b[both]
        if a.numel():
            yield a, b
