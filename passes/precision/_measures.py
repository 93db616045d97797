"""How far outputs lie from those of a reference: KL divergence of logits, relative noise, top-1 disagreement.

Each measure is a ratio of sums, so that batches can be added up: an output gives a numerator and a denominator a batch,
its loss is the ratio of the sums, and the loss of a program is the mean over its outputs. Padding does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bitlower.ir import Batch, BitlowerError, Program, nearest
from bitlower.ir.tokens import token_mask

Kind = Literal["kl", "sqnr", "disagreement"]
Choice = Literal["auto", "kl", "sqnr", "disagreement"]
Sums = tuple[tuple[float, float], ...]
"""Numerator and denominator of each output."""
_ROWS = 1 << 22
"""Entries of logits that are float64 at a time: 32 MB."""
_PAST = "present."


@dataclass(frozen=True)
class _Side:
    """One output of the reference: what comparisons need of it, in blocks of rows, and a sum over it."""

    parts: tuple[torch.Tensor, ...]
    total: float


@dataclass(frozen=True)
class ReferenceOutputs:
    """The outputs of the reference on a batch, made ready for many comparisons."""

    batch: Batch
    sides: tuple[_Side, ...]

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(part.nbytes for side in self.sides for part in side.parts)


@dataclass(frozen=True)
class Measure:
    """What is measured, and on which outputs.

    ``kl`` is the mean divergence in nats of the softmax along the last axis from the reference's, ``sqnr`` the energy
    of the noise over that of the signal (the inverse of the signal-to-quantization-noise ratio), ``disagreement`` the
    share of vectors whose largest entry is another one.
    """

    kind: Kind
    outputs: tuple[str, ...]

    @classmethod
    def choose(cls, program: Program, kind: Choice, outputs: Sequence[str] = ()) -> Measure:
        """The measure ``kind`` for ``program``; ``auto`` is ``kl`` on logits where there are some, else ``sqnr``.

        Raises:
            BitlowerError: the program returns no such output, or no logits for a measure that needs some.
        """
        known = [spec.name for spec in program.outputs if spec.type.is_float and not spec.name.startswith(_PAST)]
        for name in outputs:
            if name not in known:
                raise BitlowerError(f"the model gives no output {name!r} to measure", hint=nearest(name, known))
        logits = [name for name in outputs or known if "logits" in name]
        if kind == "auto":
            kind = "kl" if logits else "sqnr"
        if kind == "sqnr":
            return cls(kind, tuple(outputs or known))
        if not outputs and not logits:
            raise BitlowerError(f"the measure {kind} needs logits, the model gives none", hint="take sqnr")
        return cls(kind, tuple(outputs or logits))

    @property
    def unit(self) -> str:
        """What the numbers are, in words."""
        return {"kl": "nats", "sqnr": "noise/signal", "disagreement": "share"}[self.kind]

    def reference(self, expected: Sequence[torch.Tensor], batch: Batch) -> ReferenceOutputs:
        """The outputs on one batch, in the order of ``outputs``, as what others are compared with."""
        prepare, _ = _SUMS[self.kind]
        return ReferenceOutputs(batch, tuple(prepare(_vectors(value, batch)) for value in expected))

    def against(self, reference: ReferenceOutputs, actual: Sequence[torch.Tensor]) -> Sums:
        """Outputs on one batch against those of the reference."""
        _, compare = _SUMS[self.kind]
        pairs = zip(reference.sides, actual, strict=True)
        return tuple(compare(side, _vectors(value, reference.batch)) for side, value in pairs)

    def compare(self, expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], batch: Batch) -> Sums:
        """One batch: ``expected`` and ``actual`` are the outputs in the order of ``outputs``."""
        return self.against(self.reference(expected, batch), actual)

    @staticmethod
    def total(parts: Sequence[Sums]) -> float:
        """The loss over all batches; Inf where outputs are not finite."""
        ratios = []
        for output in zip(*parts, strict=True):
            above, below = math.fsum(part[0] for part in output), math.fsum(part[1] for part in output)
            ratios.append(above / below if below else float(above > 0))
        mean = math.fsum(ratios) / len(ratios)
        return math.inf if math.isnan(mean) else mean


def decibels(noise: float) -> float:
    """A signal-to-quantization-noise ratio in dB from noise over signal."""
    if not noise:
        return math.inf
    return -10 * math.log10(noise) if math.isfinite(noise) else -math.inf


def _vectors(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The vectors along the last axis, ``[n, width]``, without those of padding."""
    mask = token_mask(batch)
    if mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape and not bool(mask.all()):
        value = value[mask]
    return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)


def _probabilities(expected: torch.Tensor) -> _Side:
    """The softmax of each row, in double precision, and ``Σ p · log p``."""
    parts, total = [], 0.0
    for part in torch.split(expected, _block(expected)):
        log_p = part.double().log_softmax(-1)
        parts.append(log_p.exp())
        total += float(log_p.mul_(parts[-1]).sum())
    return _Side(tuple(parts), total)


def _divergence(expected: _Side, actual: torch.Tensor) -> tuple[float, float]:
    """``Σ p · log p − Σ p · log q`` over all vectors, in double precision, and how many they are."""
    crossed = 0.0
    for p, part in zip(expected.parts, torch.split(actual, _block(actual)), strict=True):
        crossed += float(part.double().log_softmax(-1).mul_(p).sum())
    divergence = expected.total - crossed
    return divergence if math.isnan(divergence) else max(divergence, 0.0), float(len(actual))


def _block(vectors: torch.Tensor) -> int:
    """Rows that are worked on at a time."""
    return max(1, _ROWS // vectors.shape[-1])


def _signal(expected: torch.Tensor) -> _Side:
    """The rows, and their energy."""
    return _Side((expected,), float(expected.double().square().sum()))


def _noise(expected: _Side, actual: torch.Tensor) -> tuple[float, float]:
    """The energy of the difference, and that of the signal."""
    return float((actual.double() - expected.parts[0]).square_().sum()), expected.total


def _largest(expected: torch.Tensor) -> _Side:
    """Where each row has its largest entry."""
    return _Side((expected.argmax(-1),), 0.0)


def _disagreement(expected: _Side, actual: torch.Tensor) -> tuple[float, float]:
    """How many vectors have their largest entry elsewhere, and how many there are."""
    return float((expected.parts[0] != actual.argmax(-1)).sum()), float(len(actual))


_SUMS: dict[Kind, tuple[Callable[[torch.Tensor], _Side], Callable[[_Side, torch.Tensor], tuple[float, float]]]] = {
    "kl": (_probabilities, _divergence),
    "sqnr": (_signal, _noise),
    "disagreement": (_largest, _disagreement),
}
