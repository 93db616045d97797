"""Batches in the types and sizes that a model takes: cast, padded, and results cut again to what was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.types import Length, TensorType

Batch = Mapping[str, torch.Tensor]
TOKENS = "input_ids"
"""The input that is padded with the padding token."""


@dataclass(frozen=True)
class ValueSpec:
    """A named input or output and its type."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"


def fit(inputs: Batch, specs: Sequence[ValueSpec], lengths: Mapping[str, Length], pad_token: int | None) -> Batch:
    """What :meth:`~bitlower.ir.Program.fitted` returns; what a runtime holds in tensors of its own stays as it is."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    padded = padded_sizes(tensors, specs, lengths)
    changed = {}
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None:
            continue
        fitted = _cast(tensor, spec.type.dtype)
        for axis, dim in enumerate(spec.type.shape):
            if dim in padded and axis < tensor.dim():
                fill = pad_token or 0 if spec.name == TOKENS else 0
                fitted = _pad(fitted, axis, padded[dim][1], fill)
        if fitted is not tensor:
            changed[spec.name] = fitted
    return {**inputs, **changed} if changed else inputs


def padded_sizes(
    inputs: Batch, specs: Sequence[ValueSpec], lengths: Mapping[str, Length]
) -> dict[str | int, tuple[int, int]]:
    """The dimensions that must be padded: the size that ``inputs`` have and the one that the model takes.

    Raises:
        BitlowerError: a dimension is longer than the model takes.
    """
    sizes: dict[str | int, tuple[int, int]] = {}
    for spec in specs if lengths else ():
        tensor = inputs.get(spec.name)
        for axis, dim in enumerate(spec.type.shape):
            length = lengths.get(dim) if isinstance(dim, str) and tensor is not None and axis < tensor.dim() else None
            if tensor is None or length is None or length.takes(size := tensor.shape[axis]):
                continue
            wanted = length.padded(size)
            if not length.takes(wanted):
                raise BitlowerError(
                    f"the input {spec.name!r} has {size} in the dimension {dim!r}, the model takes {length}"
                )
            sizes[dim] = size, wanted
    return sizes


def crop(
    results: dict[str, torch.Tensor], specs: Sequence[ValueSpec], padded: Mapping[str | int, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """``results`` with each padded dimension cut to its size before."""
    for spec in specs if padded else ():
        for axis, dim in enumerate(spec.type.shape):
            if dim in padded:
                results[spec.name] = results[spec.name].narrow(axis, 0, padded[dim][0])
    return results


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    floats = tensor.is_floating_point() and dtype.is_floating_point
    whole = not tensor.is_floating_point() and not dtype.is_floating_point and torch.bool not in (dtype, tensor.dtype)
    return tensor.to(dtype) if (floats or whole) and tensor.dtype != dtype else tensor


def _pad(tensor: torch.Tensor, axis: int, size: int, fill: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_full(shape, fill)], axis)
