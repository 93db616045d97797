"""What a linear computes, and how its weight lies in memory."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from bitlower.backends.tvm_kernels.spec.base import (
    STATIC_KINDS,
    KernelSpec,
    NoKernel,
    check_activation,
    check_codes,
    check_keep,
    check_kind,
    check_operand,
    operand_label,
    static_scales,
)
from bitlower.ir import BitlowerError, QuantSpec, ScaleConvention

WEIGHT_KINDS = ("tensor", "channel", "row-group", "group")


class Layout(enum.StrEnum):
    """How weight codes lie in memory; the number is the version of the layout.

    ``rows-1``: 8-bit codes int8 [N, K]; narrower ones as a stream of bits along the inputs in int32 words,
    code k in the bits k·b … k·b + b − 1, lowest first. ``panels-1``: panels of 64 outputs, within a panel one int32
    word an output and step, see :mod:`bitlower.backends.tvm_kernels.spec.packing`.
    """

    ROWS = "rows-1"
    PANELS = "panels-1"


@dataclass(frozen=True, kw_only=True)
class LinearSpec(KernelSpec):
    """``round(activation(x [M, K] · Wᵀ [K, N] + bias)) + residual``, rounded to ``output`` codes if that is given.

    Args:
        k: inputs, the columns of the weight.
        n: outputs, its rows.
        weight: grid and granularity (tensor, channel, row-group or group) of the weight; None: it is float, as ``x``.
        x_quant: those of ``x``, which then comes as codes; None: ``x`` is float. Per tensor, per token, or embedding
            groups (then the product is a sum over them: PEG).
        splits: sizes of the embedding groups of ``x`` where they are not equal.
        bias: whether there is one.
        activation: one of :data:`~bitlower.backends.tvm_kernels.spec.base.ACTIVATION_FUNCTIONS`.
        rounded: static quantizer whose rounding the product gets before the residual is added; None: it gets none.
        residual: whether [M, N] is added.
        residual_codes: quantizer of the residual, which then comes as codes; None: it is float.
        output: quantizer of the result (static); None: float.
        keep: one of :data:`KEEP`, where there are codes.
        layout: of the weight codes.
    """

    configured: ClassVar[bool] = True
    k: int
    n: int
    weight: QuantSpec | None
    x_quant: QuantSpec | None = None
    splits: tuple[int, ...] = ()
    bias: bool = False
    activation: str = ""
    rounded: QuantSpec | None = None
    residual: bool = False
    residual_codes: QuantSpec | None = None
    output: QuantSpec | None = None
    keep: str = ""
    layout: Layout = Layout.ROWS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.activation)
        if self.weight is not None:
            check_kind(self.weight, WEIGHT_KINDS, "a weight")
            if self.weight.grid.bits > 8:
                raise NoKernel(f"weights of kernels have at most 8 bits, not {self.weight.grid.bits}")
        elif self.x_quant is not None:
            raise NoKernel("kernels have no product of codes with float weights", hint="quantize the weight")
        if self.x_quant is not None:
            check_kind(self.x_quant, (*STATIC_KINDS, "token"), "an activation")
            check_codes(self.x_quant)
        for static in (self.output, self.rounded):
            if static is not None:
                check_kind(static, STATIC_KINDS, "the output of a linear")
                check_codes(static)
        check_operand(self.residual_codes, self.residual, "residual")
        check_keep(self.keep, self.output)
        if sum(self.splits) not in (0, self.k):
            raise BitlowerError(f"splits of {list(self.splits)} do not add up to {self.k} inputs")
        self._check_sums()
        if self.layout is Layout.PANELS and any(size % self.step for size in self.segment_sizes):
            raise BitlowerError(
                f"layout {self.layout} packs {self.step} inputs at a time, which does not divide groups of "
                f"{list(dict.fromkeys(self.segment_sizes))}",
                hint=f"use {Layout.ROWS}",
            )

    def _check_sums(self) -> None:
        """Integer sums need weights that fit a signed byte once their zero point is taken off."""
        if self.weight is None:
            return
        grid = self.weight.grid
        narrow = self.bits < 8 or (grid.symmetric and self.centre <= 1 << 7 and grid.quant_max - self.centre < 1 << 7)
        if not narrow and (self.x_quant is not None or grid.symmetric):
            raise NoKernel(f"kernels have no integer product for weights in {grid}", hint="use symmetric weights")

    @property
    def label(self) -> str:
        """For example ``n768_k3072_w4g64_u8token_gelu``."""
        weight = f"w{self.bits}g{self.group_size}" if self.grouped else f"w{self.bits}"
        parts = [f"n{self.n}", f"k{self.k}", weight, operand_label(self.x_quant, self.dtype)]
        return "_".join(filter(None, [*parts, self.activation]))

    @property
    def bits(self) -> int:
        """Bits that a stored weight takes: 2, 3, 4 or 8 where it is codes."""
        if self.weight is None:
            return int(self.dtype.removeprefix("float"))
        bits = self.weight.grid.bits
        return bits if bits in (2, 3, 4) else 8

    @property
    def step(self) -> int:
        """Consecutive inputs that are packed together in panels."""
        return {2: 16, 3: 32, 4: 8, 8: 4}.get(self.bits, 1)

    @property
    def group_size(self) -> int:
        """Inputs that share a stored scale of the weight."""
        if self.weight is None:
            return self.k
        granularity = self.weight.granularity
        return granularity.block_size(self.k) if granularity.kind == "group" else self.k

    @property
    def grouped(self) -> bool:
        """Whether an output has several weight scales."""
        return self.group_size != self.k

    @property
    def has_zeros(self) -> bool:
        """Whether the weight has zero points of its own, rather than a constant."""
        return self.weight is not None and not self.weight.grid.symmetric

    @property
    def centre(self) -> int:
        """The code that means zero, for symmetric weights."""
        if self.weight is None:
            return 0
        grid = self.weight.grid
        return 1 << (grid.bits - 1) if grid.convention is ScaleConvention.OFFSET else 0

    @property
    def x_group_sizes(self) -> tuple[int, ...]:
        """How many consecutive inputs share a scale of ``x``, group by group."""
        if self.splits:
            return self.splits
        count = static_scales(self.x_quant, self.k) if self.x_quant else 1
        return (self.k // count,) * count

    @property
    def segment_sizes(self) -> tuple[int, ...]:
        """The longest runs of inputs within which neither scale changes."""
        ends = {self.group_size * (i + 1) for i in range(self.k // self.group_size)}
        total = 0
        for size in self.x_group_sizes:
            total += size
            ends.add(total)
        rising = [0, *sorted(ends)]
        return tuple(b - a for a, b in pairwise(rising))


def table_spec(shape: Sequence[int], weight: QuantSpec) -> LinearSpec:
    """An embedding table ``[entries, columns]`` as the weight of a linear: that is how it is packed.

    Raises:
        BitlowerError: kernels do not read such a table.
    """
    entries, columns = shape
    return LinearSpec(k=columns, n=entries, weight=weight)
