"""Batches of a run: to calibrate on, to check with, and to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitlower.ir import Batch
from bitlower.passes import digest_batches


@dataclass(frozen=True)
class Data:
    """Input batches: to calibrate on, and held-out ones for the ledger, the contracts and the artifact's checks.

    ``lead`` are the tokens that all windows of a language model begin with. ``training`` are batches to train on, which
    may have ``labels``, and ``held_out`` others to choose the best step by. ``notes`` are for whoever runs them.
    """

    calibration: Sequence[Batch] = ()
    evaluation: Sequence[Batch] = ()
    lead: tuple[int, ...] = ()
    training: Sequence[Batch] = ()
    held_out: Sequence[Batch] = ()
    notes: tuple[str, ...] = ()

    def provenance(self) -> dict[str, Any]:
        """How many batches there are, and their hashes."""
        form = {"calibration_batches": len(self.calibration), "calibration_sha256": digest_batches(self.calibration)}
        parts = {"training": self.training, "held_out": self.held_out}
        for name, batches in parts.items() if self.training else ():
            form |= {f"{name}_batches": len(batches), f"{name}_sha256": digest_batches(batches)}
        return form | ({"window_lead": list(self.lead)} if self.lead else {})
