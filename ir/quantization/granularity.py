"""Granularity: which elements of a tensor share one scale and zero point."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from bitlower.ir.diagnostics import BitlowerError, shorten
from bitlower.ir.types import Dim

_SMALLEST_BLOCK = 8
"""Entries that a stored scale must serve: of fewer, scales take more room than codes save."""
_TOO_LARGE = 1 << 31
"""No axis of a tensor has so many entries; sizes beyond are mistakes, and int32 does not hold them."""
KINDS = ("tensor", "channel", "group", "row-group", "token", "embedding", "embedding-group", "embedding-parts")
COUNTED = ("row-group", "embedding-group", "embedding-parts")
"""The kinds that need the number of groups; ``group`` needs the size of one."""


@dataclass(frozen=True)
class Granularity:
    """How scales are laid out; make one by the named constructors.

    A scale tensor has the rank of the tensor it belongs to. Each of its dimensions is 1 (shared), the tensor's own size
    (one scale an index), or a divisor of it (one scale a block of consecutive indices); per-tensor scales have rank 0.

    Args:
        kind: one of :data:`KINDS`.
        axis: along which scales differ.
        group_size: of the kind ``group``: how many consecutive entries share a scale.
        num_groups: of the kinds of :data:`COUNTED`: how many groups there are.
    """

    kind: str
    axis: int = 0
    group_size: int = 0
    num_groups: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BitlowerError(f"unknown granularity {self.kind!r}", hint=f"known: {', '.join(KINDS)}")
        if self.kind == "group" and not 1 <= self.group_size < _TOO_LARGE:
            raise BitlowerError(f"granularity group needs a group_size of at least 1, not {self.group_size}")
        if self.kind in COUNTED and not 1 <= self.num_groups < _TOO_LARGE:
            raise BitlowerError(f"granularity {self.kind} needs num_groups of at least 1, not {self.num_groups}")

    @classmethod
    def per_tensor(cls) -> Granularity:
        """One scale for the whole tensor."""
        return cls("tensor")

    @classmethod
    def per_channel(cls, axis: int = 0) -> Granularity:
        """One scale an index along ``axis`` (0 is the output channel of a linear weight, the row of a table)."""
        return cls("channel", axis)

    @classmethod
    def per_group(cls, size: int, axis: int = -1) -> Granularity:
        """One scale a row and a block of ``size`` consecutive entries along ``axis`` (GPTQ's group size).

        Where the size does not divide the axis, the last group is shorter, and scales are stored once for each block of
        the greatest common divisor: those of one group are equal.
        """
        return cls("group", axis, size)

    @classmethod
    def row_group(cls, groups: int) -> Granularity:
        """``groups`` blocks of whole rows (ZeroQuant): the scale factors out of an integer matmul."""
        return cls("row-group", 0, num_groups=groups)

    @classmethod
    def per_token(cls) -> Granularity:
        """One scale a token, computed when the program runs (dynamic)."""
        return cls("token", -1)

    @classmethod
    def per_embedding(cls) -> Granularity:
        """One scale an index of the last axis (Bondarenko et al. §4)."""
        return cls("embedding", -1)

    @classmethod
    def per_embedding_group(cls, groups: int) -> Granularity:
        """``groups`` equal blocks of the last axis (Bondarenko et al. §4, PEG)."""
        return cls("embedding-group", -1, num_groups=groups)

    @classmethod
    def per_embedding_parts(cls, groups: int) -> Granularity:
        """At most ``groups`` runs of consecutive indices of the last axis; calibration chooses where they end.

        Unequal groups isolate outlier dimensions, which equal ones (Bondarenko et al. §4) mix with others. Scales are
        stored for each index; those of one group are equal.
        """
        return cls("embedding-parts", -1, num_groups=groups)

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from the values when the program runs."""
        return self.kind == "token"

    @property
    def chosen(self) -> bool:
        """Whether calibration chooses which indices share a scale."""
        return self.kind == "embedding-parts"

    def scale_shape(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        """The shape of a stored scale for a tensor of ``shape``.

        Raises:
            BitlowerError: a group size or count does not divide its axis, an axis is missing or symbolic, or the
                granularity is dynamic and stores none.
        """
        if self.kind == "tensor":
            return ()
        if self.dynamic:
            raise BitlowerError("per-token scales are computed at run time and not stored")
        rank = len(shape)
        if not -rank <= self.axis < rank:
            raise BitlowerError(f"{self} needs axis {self.axis}, but the tensor has the shape {list(shape)}")
        extent = shape[self.axis]
        if not isinstance(extent, int):
            raise BitlowerError(f"{self}: axis {self.axis} has the symbolic size {extent!r}, a static one is needed")
        if self.kind == "group":
            return _replace(tuple(_static(self, d) for d in shape), self.axis, extent // self.block_size(extent))
        each = self.num_groups == 0 or self.chosen
        count = extent if each else self._divide(extent, self.num_groups)
        return _replace((1,) * rank, self.axis, count)

    def _divide(self, extent: int, count: int) -> int:
        if count == 0 or extent % count:
            raise BitlowerError(
                f"{self} does not divide an axis of {extent}", hint="choose a divisor, or exclude the tensor"
            )
        return count

    def block_size(self, extent: int) -> int:
        """How many consecutive entries of an axis of ``extent`` share a stored scale of a group.

        Raises:
            BitlowerError: the group size and the axis have too little in common.
        """
        block = extent if self.group_size >= extent else math.gcd(self.group_size, extent)
        if block < min(self.group_size, extent, _SMALLEST_BLOCK):
            raise BitlowerError(
                f"{self} and an axis of {extent} have only blocks of {block} in common",
                hint="choose a divisor, or exclude the tensor",
            )
        return block

    def pad_groups(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with zeros after its last axis, so that its groups are all whole."""
        return functional.pad(x, (0, -x.shape[-1] % min(self.group_size, x.shape[-1])))

    def to_blocks(self, values: torch.Tensor, extent: int) -> torch.Tensor:
        """One value for each group along the last axis as one for each stored block of an axis of ``extent``."""
        block = self.block_size(extent)
        repeated = values.repeat_interleave(min(self.group_size, extent) // block, -1)
        return repeated[..., : extent // block].contiguous()

    def range_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of ``x`` over each set of elements that share a stored scale, in the scale's shape.

        For ``embedding-parts`` that is each index, for the parts are not known yet.
        """
        shape = (*x.shape[:-1], 1) if self.dynamic else self.scale_shape(tuple(x.shape))
        if shape == ():
            return torch.aminmax(x)
        if self.kind != "group":
            blocked, inner = block(x, shape)
            return blocked.amin(inner).reshape(shape), blocked.amax(inner).reshape(shape)
        extent = x.shape[self.axis]
        padded = self.pad_groups(x.movedim(self.axis, -1))
        parts = padded.reshape(*padded.shape[:-1], -1, min(self.group_size, extent))
        low, high = (self.to_blocks(part, extent) for part in (parts.amin(-1), parts.amax(-1)))
        return low.movedim(-1, self.axis), high.movedim(-1, self.axis)

    def __str__(self) -> str:
        match self.kind:
            case "channel":
                return f"per-channel({self.axis})"
            case "group":
                along = "" if self.axis == -1 else f", axis={self.axis}"
                return f"per-group({self.group_size}{along})"
            case "row-group" | "embedding-group" | "embedding-parts":
                return f"{'' if self.kind == 'row-group' else 'per-'}{self.kind}({self.num_groups})"
            case _:
                return f"per-{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """The granularity that prints as ``text``.

        Raises:
            BitlowerError: ``text`` is not one.
        """
        match = re.fullmatch(r"(?:per-)?([a-z-]+?)(?:\((-?\d{1,18})(?:, axis=(-?\d{1,18}))?\))?", text.strip())
        kind, number, axis = match.groups() if match else ("", None, None)
        value = int(number) if number else 0
        if axis is not None and kind != "group":
            kind = ""
        if kind == "channel":
            return cls.per_channel(value)
        if kind == "group":
            return cls.per_group(value, int(axis) if axis else -1)
        simple = {"tensor": cls.per_tensor, "token": cls.per_token, "embedding": cls.per_embedding}
        if kind in simple and number is None:
            return simple[kind]()
        grouped = {
            "row-group": cls.row_group,
            "embedding-group": cls.per_embedding_group,
            "embedding-parts": cls.per_embedding_parts,
        }
        if kind in grouped:
            return grouped[kind](value)
        raise BitlowerError(f"{shorten(repr(text))} is not a granularity", hint=f"known: {', '.join(KINDS)}")


def block(x: torch.Tensor, scale_shape: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """``x`` with every axis split in (blocks, elements of a block) as ``scale_shape`` says, and the inner axes.

    An axis without elements, such as that of no tokens, has no blocks.

    Raises:
        BitlowerError: a dimension of ``scale_shape`` does not divide that of ``x``.
    """
    if len(scale_shape) != x.dim() or any(n % s if s else n for n, s in zip(x.shape, scale_shape, strict=False)):
        raise BitlowerError(f"a scale of shape {list(scale_shape)} does not fit a tensor of shape {list(x.shape)}")
    split = [part for n, s in zip(x.shape, scale_shape, strict=True) for part in (s, n // s if s else 1)]
    return x.reshape(split), list(range(1, 2 * x.dim(), 2))


def _static(granularity: Granularity, extent: Dim) -> int:
    if not isinstance(extent, int):
        raise BitlowerError(f"{granularity}: the tensor has the symbolic dimension {extent!r}")
    return extent


def _replace(shape: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], value, *shape[axis + 1 :])
