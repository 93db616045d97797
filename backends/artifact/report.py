"""What the check of an artifact on the disk says, whatever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bitlower.backends.artifact.json_files import rounded_figures


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """A sound artifact; backends say more of theirs.

    Args:
        files: how many there are.
        bytes: of all of them.
        unlisted: files that the manifest does not know.
        unseen: the cosine of each output to the recorded one, at sizes that neither tracing nor calibration had.
        unseen_sizes: these.
    """

    files: int
    bytes: int
    unlisted: tuple[str, ...]
    unseen: Mapping[str, float]
    unseen_sizes: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "unlisted": list(self.unlisted), "unseen": rounded_figures(self.unseen)}

    def agreement(self, selftest: Mapping[str, float]) -> dict[str, float]:
        """The least cosine of an output with what was recorded, if any was compared."""
        cosines = [*selftest.values(), *self.unseen.values()]
        return rounded_figures({"selftest_cosine": min(cosines)}) if cosines else {}
