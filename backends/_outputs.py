"""Errors of outputs, summed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitlower.ir import CheckError, Program

Array = np.ndarray[Any, Any]


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
class _Sums:
    count: int = 0
    worst: float = 0.0
    absolute: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    theirs: float = 0.0
    product: float = 0.0
    given_codes: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation of the Program's output; its size where it is constant."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean**2
        return math.sqrt(variance) if variance > 1e-12 * mean**2 else abs(mean) or 1.0


class OutputComparison:
    """Compares the outputs of the runtime with those of the Program."""

    def __init__(self, program: Program) -> None:
        self._sums = {spec.name: _Sums() for spec in program.outputs}

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
            a, b = _pair(name, ours[name], theirs[name], visible)
            if not a.numel():
                continue
            error = (a - b).abs()
            sums.count += a.numel()
            sums.worst = max(sums.worst, float(error.max()))
            sums.absolute += float(error.sum())
            sums.total += float(a.sum())
            sums.squares += float((a * a).sum())
            sums.theirs += float((b * b).sum())
            sums.product += float((a * b).sum())

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
        for name, sums in self._sums.items():
            a, b = _pair(name, ours[name], theirs[name], visible)
            sums.given_codes = max(sums.given_codes, float((a - b).abs().max()) if a.numel() else 0.0)

    def rows(self) -> tuple[OutputError, ...]:
        """A row for each output that was compared."""
        return tuple(
            OutputError(
                name=name,
                worst=sums.worst,
                mean=sums.absolute / sums.count,
                relative=sums.worst / sums.deviation,
                cosine=sums.product / (math.sqrt(sums.squares * sums.theirs) or 1.0),
                given_codes=sums.given_codes / sums.deviation,
            )
            for name, sums in self._sums.items()
            if sums.count
        )


def _pair(
    name: str, ours: torch.Tensor, theirs: Array, visible: Mapping[str, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, without the entries that do not count and those that are infinite or NaN in both."""
    a, b = ours.detach().double(), torch.from_numpy(theirs).double()
    if a.shape != b.shape:
        raise CheckError(f"the output {name} has the shape {list(b.shape)}, the program's {list(a.shape)}")
    if visible is not None and name in visible:
        counts = visible[name].expand_as(a)
        a, b = a[counts], b[counts]
    both = a.isfinite() & b.isfinite()
    alike = (a == b) | (a.isnan() & b.isnan())
    if not bool((both | alike).all()):
        raise CheckError(f"the output {name} is not finite where the program's is, or the other way round")
    return a[both], b[both]
