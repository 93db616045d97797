"""What a format is, and what formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitlower.backends.checkpoint.contents import Layer
from bitlower.backends.checkpoint.safetensors import Entry, TensorFolder
from bitlower.backends.checkpoint.skeleton import Skeleton
from bitlower.ir import BitlowerError
from bitlower.ir.storage import parts


@dataclass(frozen=True)
class Packed:
    """How a layer is packed, as ``config.json`` says.

    Args:
        bits: of a code.
        group_size: columns that share a scale; -1: the whole row.
        symmetric: the zero points are the middle of the codes.
    """

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Weight:
    """An unpacked layer: unsigned codes [rows, columns], scales float32 and zero points uint8 [rows, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


class Format(Protocol):
    """One format."""

    name: str
    one_way_with_zeros: bool
    """Whether all layers are packed in one way where one of them has zero points."""

    @property
    def readers(self) -> tuple[str, ...]:
        """What transformers needs to read packed layers, by the names that these modules are imported by."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the scales in a checkpoint whose other weights are ``dtype``."""

    def refusal(self, packed: Packed, shape: tuple[int, int], kind: str) -> str:
        """Why a layer of ``kind`` (:class:`Skeleton`) and ``shape`` cannot be held; empty if it can."""

    def entries(self, layer: Layer, dtype: torch.dtype) -> Iterator[Entry]:
        """The tensors of a layer."""

    def config(self, layers: Sequence[Layer], skeleton: Skeleton) -> dict[str, Any]:
        """The ``quantization_config``."""

    def layers(self, config: Mapping[str, Any], folder: TensorFolder) -> dict[str, Packed]:
        """By module path how each packed layer in ``folder`` is packed, read from a ``quantization_config``."""

    def read(self, folder: TensorFolder, path: str, packed: Packed) -> Weight:
        """A packed layer."""


def how_packed(layer: Layer) -> Packed:
    """How a layer of a Program will be packed."""
    return Packed(layer.bits, layer.group_size, layer.symmetric)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        BitlowerError: a number is too large for it.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for part, kept in zip(parts(tensor), parts(result), strict=True):
        kept.copy_(part)
        if dtype.is_floating_point and not bool(kept.isfinite().all()) and bool(part.isfinite().all()):
            raise BitlowerError(
                f"{name} reaches {float(part.abs().max()):.4g}, which {str(dtype).removeprefix('torch.')} cannot hold",
                hint="choose dtype bfloat16 or float32",
            )
    return result


def pack_codes(layer: Layer, pack: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """The codes of ``layer``, packed; its own are let go of."""
    packed = pack(layer.codes(), layer.bits)
    layer.release()
    return packed


def packed_paths(folder: TensorFolder, suffix: str) -> list[str]:
    """The modules of all tensors whose names end in ``suffix``."""
    return sorted(name.removesuffix(suffix) for name in folder.names if name.endswith(suffix))
