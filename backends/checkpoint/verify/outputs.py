"""Errors of a checkpoint's outputs, summed batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitlower.backends.artifact.outputs import Sums, flat_parts, largest
from bitlower.backends.checkpoint.verify.record import OutputCheck
from bitlower.ir import CheckError

GIVEN_WEIGHTS = 1e-3
"""The largest error of an output, over its standard deviation, that float arithmetic alone may make."""
OUTPUT_COSINE = 0.9
"""The least cosine of an output with the stored weights to the Program's."""


@dataclass
class _Sums(Sums):
    model: float = 0.0

    def add_three(self, ours: torch.Tensor, rounded: torch.Tensor, model: torch.Tensor) -> None:
        for part in flat_parts(ours, rounded, model):
            a, b, c = (tensor.double() for tensor in part)
            self.add(a, b)
            self.model = max(self.model, largest((b - c).abs()))


class OutputComparison:
    """Outputs of the Program, of the Program with the stored weights, and of Hugging Face's model with them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: dict[str, _Sums] = {}

    def add(
        self,
        ours: Mapping[str, torch.Tensor],
        rounded: Mapping[str, torch.Tensor],
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
            if model[name].shape != rounded[name].shape:
                shapes = list(model[name].shape), list(rounded[name].shape)
                raise CheckError(f"the output {name} of Hugging Face's model is {shapes[0]}, the program's {shapes[1]}")
            self._sums.setdefault(name, _Sums()).add_three(ours[name], rounded[name], model[name])

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
        mean=sums.mean,
        relative=sums.worst / sums.deviation,
        cosine=sums.cosine,
        given_weights=sums.model / sums.deviation,
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
