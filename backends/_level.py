"""Which levels the backends take that write what `lower-integer` gives."""

from __future__ import annotations

from bitlower.ir import BitlowerError, Level


def check_level(level: Level) -> None:
    """See that a program at ``level`` is float, or has integer codes between operators and not inside kernels.

    Raises:
        BitlowerError: it is not; the hint says which pass is missing or too much.
    """
    if level is Level.SIMULATED:
        raise BitlowerError("a simulated program has no integers to export", hint="run the pass `lower-integer` first")
    if level is Level.FUSED:
        raise BitlowerError(
            "a fused program has kernels that this backend does not know", hint="leave out the pass `fuse`"
        )
