"""Whether a pass kept its hands off the input batches, which all passes share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from bitlower.ir import Batch, CheckError
from bitlower.passes._machinery.base import Context

_PARTS = ("calibration", "evaluation", "training", "held_out")
_Print = tuple[str, tuple[int, ...], int]


class BatchGuard:
    """Remembers the batches of a context before a pass.

    Args:
        context: whose batches are looked at, where they are lists or tuples (others make new ones at each look); what a
            pass is seen to read is not noted meanwhile.
    """

    def __init__(self, context: Context) -> None:
        part_batches = {part: vars(context)[part] for part in _PARTS}
        self._batches = {part: batches for part, batches in part_batches.items() if isinstance(batches, list | tuple)}
        self._prints = {part: _prints(batches) for part, batches in self._batches.items()}

    def check(self, name: str) -> None:
        """Hold the pass called ``name`` to what was there before it.

        Raises:
            CheckError: it wrote into a batch, or added or removed one; the place is named.
        """
        for part, batches in self._batches.items():
            before, after = self._prints[part], _prints(batches)
            if len(before) != len(after):
                raise CheckError(
                    f"the pass {name!r} left {len(after)} of {len(before)} {_words(part)} batches",
                    hint="passes share them: make a new list",
                )
            for place, (old, new) in enumerate(zip(before, after, strict=True), 1):
                if old != new:
                    wrong = min(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
                    raise CheckError(
                        f"the pass {name!r} wrote into the {_words(part)} data: "
                        f"{wrong!r} of batch {place} is not what it was",
                        hint="passes share the batches: clone what you write into",
                    )


def _words(part: str) -> str:
    return part.replace("_", "-")


def _prints(batches: Sequence[Batch]) -> list[dict[str, _Print]]:
    return [{str(name): _print(value) for name, value in batch.items()} for batch in batches]


def _print(value: object) -> _Print:
    """Dtype (or what else it is), shape and a checksum of all contents."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, (), 0
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(value.dtype), tuple(value.shape), zlib.crc32(flat.numpy().data) if flat.numel() else 0
