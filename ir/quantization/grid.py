"""Integer grids: which codes exist, and how a range of real values becomes a scale and a zero point."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

import torch

from bitlower.ir.diagnostics import BitlowerError, shorten


class ScaleConvention(enum.StrEnum):
    """How a symmetric grid turns ``absmax`` into a scale; b bits, codes down to -2^(b-1) unless restricted.

    The published methods do not agree, and the choice changes the codes:

    - ``qmax``: ``absmax / (2^(b-1) - 1)``; both ends representable (Bondarenko et al., QuantGPT).
    - ``half-range``: ``absmax / 2^(b-1)``; +absmax is clipped by one step (ZeroQuant).
    - ``half-range-eps``: ``(absmax + 5e-6) / 2^(b-1)``; as DeepSpeed's inference path.
    - ``offset``: ``2·absmax / (2^b - 1)`` with unsigned codes and zero point ``2^(b-1)`` (GPTQ ``--sym``).
    """

    QMAX = "qmax"
    HALF_RANGE = "half-range"
    HALF_RANGE_EPS = "half-range-eps"
    OFFSET = "offset"


_EPS = 5e-6
"""As in DeepSpeed's inference kernels."""
_TEXT = re.compile(r"([su])(\d{1,2})( asymmetric)?( restricted)?(?: (half-range|half-range-eps|offset))?")


@dataclass(frozen=True)
class Grid:
    """A uniform grid ``x̂ = scale · (q − zero_point)`` with integer codes q.

    Args:
        bits: 2 to 16.
        signed: codes from ``-2^(b-1)`` (else from 0).
        symmetric: the zero point is fixed; an unsigned symmetric grid with ``qmax`` is one-sided (values ≥ 0).
        restricted: drop the most negative code (2 bits ⇒ ternary); signed symmetric grids only.
        convention: how ``absmax`` becomes a scale; symmetric grids only.

    Raises:
        BitlowerError: the combination does not exist.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    restricted: bool = False
    convention: ScaleConvention = ScaleConvention.QMAX

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise BitlowerError(f"a grid has 2 to 16 bits, not {self.bits}")
        if self.restricted and not (self.signed and self.symmetric):
            raise BitlowerError("a restricted grid is signed and symmetric", hint="drop `restricted`")
        offset = self.convention is ScaleConvention.OFFSET
        if offset and (self.signed or not self.symmetric):
            raise BitlowerError("the `offset` convention takes unsigned codes of a symmetric grid")
        if not self.symmetric and self.convention is not ScaleConvention.QMAX:
            raise BitlowerError(f"the `{self.convention}` convention is for symmetric grids")
        if self.symmetric and not self.signed and self.convention not in (ScaleConvention.QMAX, ScaleConvention.OFFSET):
            raise BitlowerError(f"the `{self.convention}` convention takes signed codes")

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return (self.restricted - (1 << self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch integer dtype that holds every code."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.uint16

    def qparams(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for values in ``[low, high]``, elementwise.

        Zero is always in the range; an all-zero range gives scale 1, and NaN gives NaN. Both results are float32 and
        have the shape of ``low``; zero points are whole numbers.
        """
        low = low.float().clamp(max=0.0)
        high = high.float().clamp(min=0.0)
        if not self.symmetric:
            scale = _safe((high - low) / (self.quant_max - self.quant_min))
            zero = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)
            return scale, zero
        if not self.signed and self.convention is ScaleConvention.QMAX:
            return _safe(high / self.quant_max), torch.zeros_like(high)
        absmax = torch.maximum(-low, high)
        zero = torch.full_like(absmax, 1 << (self.bits - 1) if self.convention is ScaleConvention.OFFSET else 0)
        return _safe(self._symmetric_scale(absmax)), zero

    def _symmetric_scale(self, absmax: torch.Tensor) -> torch.Tensor:
        half = 1 << (self.bits - 1)
        match self.convention:
            case ScaleConvention.QMAX:
                return absmax / (half - 1)
            case ScaleConvention.HALF_RANGE:
                return absmax / half
            case ScaleConvention.HALF_RANGE_EPS:
                return torch.where(absmax > 0, absmax + _EPS, absmax) / half
            case ScaleConvention.OFFSET:
                return 2 * absmax / (2 * half - 1)

    def __str__(self) -> str:
        text = f"{'s' if self.signed else 'u'}{self.bits}{'' if self.symmetric else ' asymmetric'}"
        text += " restricted" if self.restricted else ""
        return text if self.convention is ScaleConvention.QMAX else f"{text} {self.convention}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid that prints as ``text``, such as ``u8 asymmetric``.

        Raises:
            BitlowerError: ``text`` is not one.
        """
        match = _TEXT.fullmatch(text)
        if not match:
            raise BitlowerError(
                f"{shorten(repr(text))} is not a grid", hint="examples: s8, u8 asymmetric, s2 restricted"
            )
        sign, bits, asymmetric, restricted, convention = match.groups()
        kind = ScaleConvention(convention) if convention else ScaleConvention.QMAX
        return cls(int(bits), sign == "s", not asymmetric, bool(restricted), kind)


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """Never zero: an all-zero slice gets 1, a subnormal one the smallest normal float32; NaN stays."""
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=torch.finfo(torch.float32).tiny))
