"""Models are computed in float32: those that hold other floats are copied, and the copy is said."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def in_float32(module: M) -> tuple[M, tuple[str, ...]]:
    """``module`` itself if its floats are float32, else a copy in which they are, with a note that says so."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    others = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values() if _other(t))
    if not others:
        return module, ()
    dtype_counts = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(others.items()))
    return copy.deepcopy(module).float(), (
        f"{type(module).__name__} has tensors of other floats ({dtype_counts}): cast to float32",
    )


def _other(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32
