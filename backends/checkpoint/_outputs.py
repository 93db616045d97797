"""Errors of outputs, summed batch by batch and part by part, so that no copy of a batch's logits is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bitlower.backends.checkpoint._verification import OutputCheck
from bitlower.ir import CheckError

GIVEN_WEIGHTS = 1e-3
"""The largest error of an output, over its standard deviation, that float arithmetic alone may make."""
OUTPUT_COSINE = 0.9
"""The least cosine of an output with the stored weights to the Program's."""
_PART = 1 << 20


@dataclass
class _Sums:
    count: int = 0
    worst: float = 0.0
    absolute: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    theirs: float = 0.0
    product: float = 0.0
    given: float = 0.0

    def add(self, ours: torch.Tensor, kept: torch.Tensor, model: torch.Tensor) -> None:
        for a, b, c in _parts(ours, kept, model):
            error = (a - b).abs()
            self.count += a.numel()
            self.worst = max(self.worst, _largest(error))
            self.given = max(self.given, _largest((b - c).abs()))
            self.absolute += float(error.sum())
            self.total += float(a.sum())
            self.squares += float(a @ a)
            self.theirs += float(b @ b)
            self.product += float(a @ b)

    @property
    def deviation(self) -> float:
        """The standard deviation of the Program's output; its size where it is constant."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean**2
        return math.sqrt(variance) if variance > 1e-12 * mean**2 else abs(mean) or 1.0


class OutputComparison:
    """Outputs of the Program, of the Program with the stored weights, and of Hugging Face's model with them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: dict[str, _Sums] = {}

    def add(
        self,
        ours: Mapping[str, torch.Tensor],
        kept: Mapping[str, torch.Tensor],
        model: Mapping[str, torch.Tensor],
    ) -> None:
        """One batch.

        Raises:
            CheckError: the model has none of the outputs, or one of another shape.
        """
        shared = [name for name in self._names if name in model and name in ours]
        if not shared:
            raise CheckError(f"Hugging Face's model gives none of {', '.join(self._names[:3])}")
        for name in shared:
            if model[name].shape != kept[name].shape:
                shapes = list(model[name].shape), list(kept[name].shape)
                raise CheckError(f"the output {name} of Hugging Face's model is {shapes[0]}, the program's {shapes[1]}")
            self._sums.setdefault(name, _Sums()).add(ours[name], kept[name], model[name])

    def rows(self) -> tuple[OutputCheck, ...]:
        """A row for each output.

        Raises:
            CheckError: one is too far off.
        """
        return tuple(_row(name, sums) for name, sums in self._sums.items())


def _row(name: str, sums: _Sums) -> OutputCheck:
    row = OutputCheck(
        name=name,
        worst=sums.worst,
        mean=sums.absolute / sums.count,
        relative=sums.worst / sums.deviation,
        cosine=sums.product / (math.sqrt(sums.squares * sums.theirs) or 1.0),
        given_weights=sums.given / sums.deviation,
    )
    if not row.given_weights <= GIVEN_WEIGHTS:
        raise CheckError(
            f"with the weights of the file, Hugging Face's model gives a {name} that is {row.given_weights:.3g}"
            f" standard deviations off the program's, where float arithmetic explains {GIVEN_WEIGHTS:.3g}",
            hint="a pass changed the graph in a way that no checkpoint can hold",
        )
    if not row.cosine >= OUTPUT_COSINE:
        raise CheckError(
            f"with the weights of the file, the output {name} has the cosine {row.cosine:.6g} to the program's",
            hint="choose dtype float32",
        )
    return row


def _largest(error: torch.Tensor) -> float:
    """The largest entry; infinity where one is not a number."""
    largest = float(error.max())
    return math.inf if math.isnan(largest) else largest


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equal tensors, flat, in parts, in float64."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PART):
        yield tuple(tensor[start : start + _PART].double() for tensor in flat)
