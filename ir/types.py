"""What a value in the graph is: dtype and shape, symbolic dimensions by name; and the level a Program is at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from bitlower.ir.diagnostics import BitlowerError

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


@dataclass(frozen=True)
class Length:
    """Which sizes of a symbolic dimension a model takes: multiples of a number, between two bounds.

    Args:
        minimum: the smallest size.
        maximum: the largest size; None for any.
        multiple: every size is a multiple of it.
    """

    minimum: int = 1
    maximum: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        sound = min(self.minimum, self.multiple) >= 1
        if not sound or (self.maximum is not None and self._up(self.minimum) > self.maximum):
            raise BitlowerError(f"no size is {self}")

    @property
    def longest(self) -> int | None:
        """The largest size that may be asked for; None if there is none."""
        return None if self.maximum is None else self.maximum // self.multiple * self.multiple

    def padded(self, size: int) -> int:
        """The smallest size that the model takes and into which ``size`` goes; ``size`` itself if there is none."""
        wanted = self._up(max(size, self.minimum))
        return size if self.longest is not None and wanted > self.longest else wanted

    def takes(self, size: int) -> bool:
        """Whether the model takes ``size``."""
        return self.padded(size) == size and (self.longest is None or size <= self.longest)

    def _up(self, size: int) -> int:
        return -(-size // self.multiple) * self.multiple

    def __str__(self) -> str:
        parts = [f"a multiple of {self.multiple}"] if self.multiple > 1 else []
        parts += [f"at least {self.minimum}"] if self.minimum > 1 else []
        parts += [f"at most {self.maximum}"] if self.maximum is not None else []
        return ", ".join(parts) or "any"
