"""What a value in the graph is: dtype and shape, symbolic dimensions by name; and the level a Program is at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

Dim = int | str


class Level(enum.StrEnum):
    """How far a Program is lowered (exactly one at a time).

    ``float``: as traced. ``simulated``: explicit ``fake_quantize`` nodes, differentiable. ``integer``: weights are
    codes behind ``dequantize``, activations pass through ``quantize → dequantize``. ``fused``: kernel operators read
    and give codes; those nodes that could be taken into them are gone.
    """

    FLOAT = "float"
    SIMULATED = "simulated"
    INTEGER = "integer"
    FUSED = "fused"


@dataclass(frozen=True)
class TensorType:
    """The dtype and shape of a value; a symbolic dimension is its name, e.g. ``("batch", "sequence", 384)``."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether values are floating point."""
        return self.dtype.is_floating_point

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        """The same shape holding another dtype."""
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"
