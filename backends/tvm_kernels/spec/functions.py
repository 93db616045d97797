"""The functions that a Program becomes: one, or an encoder and a decoder."""

from __future__ import annotations

from bitlower.backends.artifact.stages import parts_of
from bitlower.ir import Program

MAIN = "main"
"""The function of a model in one piece."""


def functions_of(program: Program) -> dict[str, Program]:
    """What each function of a library computes, by name: ``main``, or ``encoder`` and ``decoder``.

    Raises:
        BitlowerError: it is an encoder-decoder that cannot be cut in two.
    """
    return {stage or MAIN: part for stage, part in parts_of(program).items()}
