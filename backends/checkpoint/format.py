"""What a format is, what formats share, and formats by name."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitlower.backends.checkpoint.container import Container, Entry, Tensors
from bitlower.backends.checkpoint.contents import Layer, is_symmetric
from bitlower.backends.checkpoint.safetensors import Safetensors
from bitlower.backends.checkpoint.skeleton import Skeleton
from bitlower.ir import BitlowerError, QuantSpec, packing
from bitlower.ir.plugins.catalog import Catalog
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


@dataclass(frozen=True)
class Format(abc.ABC):
    """One format: a file in ``formats/`` that is called like it, or an entry point of ``bitlower.checkpoint_formats``.

    Decorate the class with ``@dataclass(frozen=True)`` and set ``name`` and ``readers``.
    """

    name: ClassVar[str] = ""
    unfolds: ClassVar[bool] = False
    """Whether transformers can be told to dequantize the layers while it loads them."""
    one_way_with_zeros: ClassVar[bool] = False
    """Whether all layers are packed in one way where one of them has zero points."""
    readers: ClassVar[tuple[str, ...]] = ()
    """What transformers needs to read packed layers, by the names that these modules are imported by."""
    container: ClassVar[Container] = Safetensors()
    """What holds all tensors, packed ones and others."""

    @abc.abstractmethod
    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the scales in a checkpoint whose other weights are ``dtype``."""

    @abc.abstractmethod
    def refusal(self, packed: Packed, shape: tuple[int, int], kind: str) -> str:
        """Why a layer of ``kind`` (:class:`Skeleton`) and ``shape`` cannot be held; empty if it can."""

    @abc.abstractmethod
    def entries(self, layer: Layer, dtype: torch.dtype) -> Iterator[Entry]:
        """The tensors of a layer."""

    @abc.abstractmethod
    def stored_bytes(self, packed: Packed, shape: tuple[int, int], scales: tuple[int, int], width: int) -> int:
        """The bytes of the tensors of a layer.

        Args:
            packed: how it is packed.
            shape: of the weight ``[outputs, inputs]``.
            scales: how many there are in all, and in a row.
            width: bytes of a number of the weights that stay float.
        """

    @abc.abstractmethod
    def config(self, layers: Sequence[Layer], skeleton: Skeleton) -> dict[str, Any]:
        """The ``quantization_config``."""

    @abc.abstractmethod
    def layers(self, config: Mapping[str, Any], folder: Tensors) -> dict[str, Packed]:
        """By module path how each packed layer in ``folder`` is packed, read from a ``quantization_config``."""

    @abc.abstractmethod
    def read(self, folder: Tensors, path: str, packed: Packed) -> Weight:
        """A packed layer."""


FORMATS: Catalog[Format] = Catalog(
    what="checkpoint format",
    base=Format,  # type: ignore[type-abstract]  # classes that derive from it are found
    home="bitlower.backends.checkpoint.Format",
    group="bitlower.checkpoint_formats",
    package="bitlower.backends.checkpoint.formats",
    folder=Path(__file__).parent / "formats",
    problem=lambda cls: None,
)


def known_formats() -> tuple[str, ...]:
    """The names of all formats; imports none."""
    return tuple(sorted(FORMATS.providers()))


def find_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        BitlowerError: unknown (the nearest match is named), offered twice, or broken.
    """
    return FORMATS.find(name)()


def words(count: int, bits: int) -> int:
    """The 32-bit words that ``count`` codes fill."""
    return -(-count * bits // packing.WORD)


def refusal(form: Format, spec: QuantSpec, shape: tuple[int, int], kind: str) -> str:
    """Why ``form`` cannot hold a weight [rows, columns] of a module of ``kind``; empty if it can."""
    granularity = spec.granularity
    if spec.grid.bits > 8:
        return f"checkpoint formats hold codes of up to 8 bits, not of {spec.grid.bits}"
    if granularity.kind not in ("tensor", "channel", "row-group", "group") or granularity.axis % 2 != (
        granularity.kind == "group"
    ):
        return f"checkpoint formats have a scale for each row or each group of inputs, not {granularity}"
    try:
        granularity.scale_shape(shape)
    except BitlowerError as error:
        return str(error)
    return form.refusal(packed_as(spec, shape[1]), shape, kind)


def packed_as(spec: QuantSpec, columns: int) -> Packed:
    """How a weight of so many columns is packed."""
    granularity = spec.granularity
    size = granularity.block_size(columns) if granularity.kind == "group" else -1
    return Packed(spec.grid.bits, size, is_symmetric(spec))


def how_packed(layer: Layer) -> Packed:
    """How a layer of a Program will be packed."""
    return Packed(layer.bits, layer.group_size, layer.symmetric)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        BitlowerError: a number is too large for it.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for part, target in zip(parts(tensor), parts(result), strict=True):
        target.copy_(part)
        if dtype.is_floating_point and not bool(target.isfinite().all()) and bool(part.isfinite().all()):
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


def packed_paths(folder: Tensors, suffix: str) -> list[str]:
    """The modules of all tensors whose names end in ``suffix``."""
    return sorted(name.removesuffix(suffix) for name in folder.names if name.endswith(suffix))
