"""Counting codes that agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitlower.backends.artifact.rounding import TIE, Rounding
from bitlower.backends.onnx_qdq.verify.record import CodeError
from bitlower.ir import Quantizer

NOISE = 4.0
"""So many times what linears that round otherwise do to a value may float arithmetic do to it: norms, softmax and
activation functions of the runtime round otherwise too."""
MOST = 0.25
"""Steps that noise explains at most: beyond, a code says little of its value."""


@dataclass
class Tally:
    """Sums over batches for one quantized value; a step may have none of its codes."""

    codes: int = 0
    equal: int = 0
    off_by_one: int = 0
    worst: int = 0
    given_equal: int = 0
    excess: float = 0.0
    exact: int = 0
    exact_codes: int = 0
    steps: int = 255
    noise: float = 0.0

    def add_alone(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Codes that both computed on their own."""
        difference = (ours.int() - theirs.int()).abs()
        self.codes += difference.numel()
        self.equal += int((difference == 0).sum())
        self.off_by_one += int((difference == 1).sum())
        self.worst = max(self.worst, int(difference.max()) if difference.numel() else 0)

    def add_given(self, ours: torch.Tensor, theirs: torch.Tensor, rounding: Rounding) -> None:
        """The runtime's codes, and the Program's from equal codes before."""
        ours, theirs = ours.int(), theirs.int()  # torch compares no uint16
        different = ours != theirs
        self.given_equal += int((~different).sum())
        self.steps = rounding.quant_max - rounding.quant_min
        if different.any():
            self.excess = max(self.excess, rounding.excess(torch.where(different, theirs, ours)))

    @property
    def tie(self) -> float:
        """How far a value may lie from the rounding interval of its code, in steps."""
        return max(TIE * self.steps, min(self.noise, MOST))

    def add_noise(self, ours: Rounding, shaken: Rounding) -> None:
        """The same value twice: as it is, and where linears round otherwise."""
        off = (shaken.position() - ours.position()).abs()
        self.noise = max(self.noise, NOISE * float(off.max()) if off.numel() else 0.0)

    def add_exact(self, expected: torch.Tensor, theirs: torch.Tensor) -> None:
        """The runtime's codes, and those that its own float input rounds to."""
        self.exact += int((expected.int() == theirs.int()).sum())
        self.exact_codes += expected.numel()

    def row(self, name: str, quantizer: Quantizer, path: str) -> CodeError:
        """The figures."""
        return CodeError(
            name=name,
            tensor=quantizer.tensor,
            role=quantizer.role,
            path=path,
            codes=self.codes,
            equal=self.equal / self.codes,
            off_by_one=self.off_by_one / self.codes,
            worst=self.worst,
            given_codes=self.given_equal / self.codes,
            excess=self.excess,
            tie=self.tie,
            exact=self.exact / self.exact_codes if self.exact_codes else None,
        )
