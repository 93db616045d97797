"""Counting how well what a kernel of the library gave agrees with what the Program's gives of the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from bitlower.backends.artifact.rounding import TIE, Rounding
from bitlower.ir import CheckError, kernels

VALUE = 2e-4
"""The largest error of a value of one kernel, over the root mean square of its row, that float arithmetic may make."""
SMALLEST = 0.01
"""Of the root mean square of all rows: that of a row counts as so much at least."""
QPARAM = 1e-5
"""How far a scale that is computed at run time may be from the Program's, relatively; zero points: one step."""
TURNED = 0.01
"""The largest share of what a kernel returns that roundings inside of it, which nobody sees, may turn over."""


@dataclass(frozen=True)
class Limits:
    """What float arithmetic may make of what one kernel returns.

    Args:
        value: see :data:`VALUE`.
        own: how much a value may be off beside it, of itself.
        tie: how far a code may be off its rounding interval, of the range of the grid.
        qparam: see :data:`QPARAM`.
    """

    value: float = VALUE
    own: float = 0.0
    tie: float = TIE
    qparam: float = QPARAM


FLOAT32 = Limits()
FLOAT16_RESULT = Limits(own=2.0**-10)
"""Of kernels whose result may be rounded to 11 bits, by 2⁻¹¹ of itself at most."""
FLOAT16 = Limits(value=1e-2, own=2.0**-10, tie=1e-3, qparam=1e-3)
"""Of kernels that round weights to 11 bits too, or read what was rounded and is not seen: each by 2⁻¹¹ at most, which
mostly averages out in a sum."""


@dataclass
class Agreement:
    """Sums over batches for one kernel, or one rounding outside kernels.

    Args:
        node: of the Program.
        hidden: the kernel rounds inside, where ties show in what it returns and cannot be told.
        limits: what float arithmetic explains.
    """

    node: fx.Node
    hidden: bool = False
    limits: Limits = FLOAT32
    values: int = 0
    worst: float = 0.0
    codes: int = 0
    equal: int = 0
    excess: float = 0.0
    tie: float = 0.0
    turned: int = 0
    qparams: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The operator in a word."""
        return "choose_qparams" if self.node.target is operator.getitem else kernels.kind(self.node)

    def add_value(self, ours: Sequence[torch.Tensor], theirs: torch.Tensor) -> None:
        """Floats; ``ours`` are what the Program's kernel may give, depending on its ties.

        Raises:
            CheckError: they have another shape, or are not finite where the Program's are.
        """
        expected = ours[0]
        if expected.shape != theirs.shape or not torch.equal(expected.isfinite(), theirs.isfinite()):
            raise CheckError(f"{self.where}: the library gives another shape, or numbers that are not finite")
        if not expected.numel():
            return
        error = torch.stack([(value.double() - theirs.double()).abs() for value in ours]).amin(0).nan_to_num(0.0)
        own = self.limits.own * expected.double().abs().nan_to_num(0.0, 0.0, 0.0)
        relative = (error - own).clamp(min=0) / _sizes(expected)
        self.values += relative.numel()
        self.worst = max(self.worst, float(relative.max()))
        self.turned += int((relative > self.limits.value).sum())

    def add_codes(self, ours: Sequence[Rounding], theirs: torch.Tensor) -> None:
        """Codes; ``ours`` as in :meth:`add_value`, with the scales of the codes."""
        codes, main = theirs.int(), ours[0]
        away = torch.stack([rounding.distances(codes) for rounding in ours]).amin(0)
        self.codes += codes.numel()
        self.equal += int((main.codes() == codes).sum())
        self.excess = max(self.excess, float(away.max()) if away.numel() else 0.0)
        self.tie = self.limits.tie * (main.quant_max - main.quant_min)
        self.turned += int((away > self.tie).sum())

    def add_qparam(self, kind: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Scales or zero points that were computed."""
        error = (ours.double() - theirs.double()).abs()
        if kind == "scale":
            error = error / ours.double().abs().clamp(min=torch.finfo(torch.float32).tiny)
        self.qparams[kind] = max(self.qparams.get(kind, 0.0), float(error.max()) if error.numel() else 0.0)

    @property
    def compared(self) -> int:
        """How many numbers were compared."""
        return self.values + self.codes

    @property
    def turned_share(self) -> float:
        """Of all that it gave, what is off by more than float arithmetic explains."""
        return self.turned / max(self.compared, 1)

    @property
    def where(self) -> str:
        """The node and its module."""
        path = self.node.meta.get("path")
        return f"%{self.node.name} ({self.kind}{f' in {path}' if path else ''})"

    def problem(self) -> str:
        """What float arithmetic does not explain; empty if there is nothing."""
        for kind, limit in (("scale", self.limits.qparam), ("zero_point", 1.0)):
            if not self.qparams.get(kind, 0.0) <= limit:
                return f"{self.where}: a {kind.replace('_', ' ')} of a token is {self.qparams[kind]:.3g} off"
        if self.turned_share <= (TURNED if self.hidden else 0):
            return ""
        share = f"{self.turned_share:.3%} of what it gives is wrong"
        if self.excess > self.tie:
            return f"{self.where}: {share}; a code is {self.excess:.3g} steps from its value"
        return f"{self.where}: {share}; a value is {self.worst:.3g} of its row off"


def _sizes(values: torch.Tensor) -> torch.Tensor:
    """The root mean square of each row, for its errors to be measured by."""
    squares = values.double().nan_to_num(0.0, 0.0, 0.0).square().mean(-1, keepdim=True)
    overall = float(squares.mean().sqrt()) or 1.0
    return squares.sqrt().clamp(min=SMALLEST * overall)
