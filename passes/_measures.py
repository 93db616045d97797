"""How far outputs lie from those of a reference: KL divergence of logits, relative noise, top-1 disagreement.

Each measure is a ratio of sums, so that batches can be added up: an output gives a numerator and a denominator a batch,
its loss is the ratio of the sums, and the loss of a program is the mean over its outputs. Padding does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bitlower.ir import Batch, BitlowerError, Program, nearest
from bitlower.passes._tokens import token_mask

Kind = Literal["kl", "sqnr", "disagreement"]
Choice = Literal["auto", "kl", "sqnr", "disagreement"]
Sums = tuple[tuple[float, float], ...]
"""Numerator and denominator of each output."""
_ROWS = 1 << 22
_PAST = "present."


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
            BitlowerError: the program gives no such output, or no logits for a measure that needs some.
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

    def compare(self, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], batch: Batch) -> Sums:
        """One batch: ``expected`` and ``found`` are the outputs in the order of ``outputs``."""
        return tuple(
            _SUMS[self.kind](_vectors(e, batch), _vectors(f, batch)) for e, f in zip(expected, found, strict=True)
        )

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


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """``Σ p · (log p − log q)`` over all vectors, in double precision, and how many they are."""
    step, total = max(1, _ROWS // expected.shape[-1]), 0.0
    for e, f in zip(torch.split(expected, step), torch.split(found, step), strict=True):
        log_p, log_q = e.double().log_softmax(-1), f.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(total, 0.0), float(len(expected))


def _noise(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """The energy of the difference, and that of the signal."""
    signal, difference = expected.double(), found.double() - expected
    return float(difference.square().sum()), float(signal.square().sum())


def _disagreement(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """How many vectors have their largest entry elsewhere, and how many there are."""
    return float((expected.argmax(-1) != found.argmax(-1)).sum()), float(len(expected))


_SUMS = {"kl": _divergence, "sqnr": _noise, "disagreement": _disagreement}
