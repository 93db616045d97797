"""From picture files to batches of a model that reads pictures alone."""

from __future__ import annotations

import torch

from bitlower.frontends._tasks import PIXELS
from bitlower.ir import Program


def reads_pictures(program: Program) -> bool:
    """Whether ``program`` reads pictures of one size and nothing else."""
    shapes = {spec.name: spec.type.shape for spec in program.inputs}
    return list(shapes) == [PIXELS] and all(isinstance(size, int) for size in shapes[PIXELS][1:])


def random_pictures(program: Program, *, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one picture of noise, ``[1, channels, height, width]`` float32, normalized as pictures are.

    Args:
        program: of :func:`reads_pictures`.
        count: of batches.
        seed: of the drawing.
    """
    shape = [int(size) for size in program.inputs[0].type.shape[1:]]
    generator = torch.Generator().manual_seed(seed)
    return [{PIXELS: torch.randn((1, *shape), generator=generator)} for _ in range(count)]
