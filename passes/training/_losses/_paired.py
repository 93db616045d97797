"""Values inside the student beside those of the teacher that they are to be like."""

from __future__ import annotations

import torch

from bitlower.ir import BitlowerError


def paired(
    name: str, student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values of the student with those of the teacher that they are to be like.

    Raises:
        BitlowerError: there are none, or they are of different numbers or shapes; ``name`` is the loss.
    """
    shapes = [[tuple(value.shape) for value in values] for values in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        what = "the model has none" if not student else f"student and teacher have {shapes[0]} and {shapes[1]}"
        raise BitlowerError(
            f"the loss {name!r} compares values of repeated blocks: {what}", hint="use a loss of the logits"
        )
    return list(zip(student, teacher, strict=True))
