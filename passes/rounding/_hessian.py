"""The second moment of a layer's inputs, which says what an error in each weight costs (Frantar et al. 2022, §3).

``H`` is the running mean over tokens of ``w_t · x_t x_tᵀ``, in float32. Its scale does not matter to a solver, but the
weights ``w_t`` do: a transformer has tokens of a hundred times the norm of the others (attention sinks), which own an
unweighted mean although a normalization follows that makes all tokens equal. Weightings are functions of ``‖x_t‖²``.
"""

from __future__ import annotations

from typing import Literal

import torch

from bitlower.ir import BitlowerError, nearest
from bitlower.ir.quantization.numerics import bfloat16_products
from bitlower.ir.token_weights import WEIGHTINGS

_TILE = 256
"""Columns of a tile of H: only tiles on and above the diagonal are computed."""
_CHUNK = 1 << 22
"""Entries of tokens that are multiplied at a time: 16 MB in float32."""
_TINY = torch.finfo(torch.float32).tiny

Precision = Literal["float32", "bfloat16"]


class Hessian:
    """``H = mean_t w_t · x_t x_tᵀ`` of one layer input, gathered batch by batch in one buffer.

    Args:
        columns: the width of the input.
        weighting: one of ``WEIGHTINGS``.
        precision: ``bfloat16`` rounds weighted inputs to bfloat16 and still sums in float32, which takes half the time
            on a CPU with such products. ``H`` is then that of the rounded inputs, positive semidefinite as ever.
        name: the layer, for messages.

    Raises:
        BitlowerError: the weighting is not known.
    """

    def __init__(
        self, columns: int, *, weighting: str = "none", precision: Precision = "float32", name: str = "a layer"
    ) -> None:
        if weighting not in WEIGHTINGS:
            raise BitlowerError(f"unknown token weighting {weighting!r}", hint=nearest(weighting, WEIGHTINGS))
        self.name = name
        self.tokens = 0
        """How many tokens were counted: those with a weight above zero."""
        self._weigh = WEIGHTINGS[weighting]
        self._rounded = precision == "bfloat16"
        self._sum = torch.zeros(columns, columns)

    @property
    def columns(self) -> int:
        """The width of the input."""
        return self._sum.shape[0]

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count the tokens of ``x``, ``[..., columns]``.

        ``weights``, ``[...]`` and not negative, multiply those of the weighting. Tokens of weight 0 (padding) and
        tokens that are zero everywhere are left out.

        Raises:
            BitlowerError: the shapes do not fit, or ``x`` or ``weights`` are not finite.
        """
        if x.shape[-1] != self.columns or (weights is not None and weights.shape != x.shape[:-1]):
            shapes = f"{list(x.shape)}" + ("" if weights is None else f" with weights {list(weights.shape)}")
            raise BitlowerError(f"{self.name}: inputs {shapes} do not fit a Hessian of {self.columns} columns")
        rows = x.detach().reshape(-1, self.columns).float()
        norms = rows.square().sum(1)
        factors = self._factors(norms, weights)
        used = factors > 0
        if not bool(used.any()):
            return
        if not bool(used.all()):
            rows, factors = rows[used], factors[used]
        self._sum.mul_(self.tokens / (self.tokens + len(rows)))
        self.tokens += len(rows)
        step = max(1, _CHUNK // self.columns)
        for part, factor in zip(torch.split(rows, step), torch.split(factors, step), strict=True):
            scaled = part * factor.sqrt()[:, None]
            if self._rounded:
                with bfloat16_products():
                    self._accumulate(scaled.bfloat16().float())
            else:
                self._accumulate(scaled)

    def _factors(self, norms: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The weight of each token, 0 for those left out; ``norms`` are ``‖x‖²``."""
        token_weights = torch.ones_like(norms) if weights is None else weights.detach().reshape(-1).float()
        used = (token_weights != 0) & ~(norms < _TINY)
        usable = torch.isfinite(norms[used]).all() & torch.isfinite(token_weights).all() & (token_weights >= 0).all()
        if not bool(usable):
            raise BitlowerError(
                f"{self.name}: its calibration inputs hold NaN, Inf or values whose square overflows, "
                "or a token weight is negative or not finite",
                hint="run the float model on the calibration data by itself",
            )
        factors = torch.zeros_like(norms)
        if bool(used.any()):
            factors[used] = self._weigh(norms[used]) * token_weights[used]
        return factors

    def _accumulate(self, rows: torch.Tensor) -> None:
        """Add ``rowsᵀ rows / tokens`` to the lower triangle, tile by tile."""
        for start in range(0, self.columns, _TILE):
            stop = min(start + _TILE, self.columns)
            tile = self._sum[start:stop, :stop]
            tile.addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=1 / self.tokens)

    def matrix(self) -> torch.Tensor:
        """``H``, ``[columns, columns]`` float32, symmetric: the buffer itself, in which the upper half is filled in.

        Raises:
            BitlowerError: no token was counted.
        """
        if not self.tokens:
            raise BitlowerError(
                f"{self.name} was never reached by calibration data",
                hint="calibrate on texts that reach it, or exclude the layer",
            )
        for start in range(0, self.columns, _TILE):
            stop = min(start + _TILE, self.columns)
            self._sum[start:stop, stop:] = self._sum[stop:, start:stop].T
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        return self._sum

    @property
    def dead(self) -> torch.Tensor:
        """The columns that no token reached, ``[columns]`` bool."""
        return self._sum.diagonal() == 0
