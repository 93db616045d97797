"""What a kernel is: one hashable description of shapes, grids, epilogue, layout and target.

A spec says everything that decides the code of a kernel, and nothing else: scales, zero points and biases are
arguments. Equal specs share one compiled kernel. The quantizers are those of the Program
(:class:`~bitlower.ir.QuantSpec`), with its numerics (:mod:`bitlower.ir.quantization.numerics`).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, ScaleConvention, nearest
from bitlower.ir.activations import IN_KERNELS

FUNCTIONS = ("", *IN_KERNELS)
"""Activation functions of an epilogue; the empty name is the identity."""
HALF = "float16"
FLOATS = ("float32", HALF)
KEEP = ("", "exact", "rounded")
"""Whether a kernel returns floats beside codes: none, the result before its rounding, or the values of its codes."""
_WEIGHT_KINDS = ("tensor", "channel", "row-group", "group")
_STATIC_KINDS = ("tensor", "embedding", "embedding-group", "embedding-parts")


class Target(enum.StrEnum):
    """Whose code: any CPU, CPUs with AVX512-VNNI, NVIDIA GPUs, OpenCL devices."""

    LLVM = "llvm"
    VNNI = "llvm-avx512-vnni"
    CUDA = "cuda"
    OPENCL = "opencl"

    @property
    def on_cpu(self) -> bool:
        """Whether the kernel runs on the host."""
        return self in (Target.LLVM, Target.VNNI)


class Layout(enum.StrEnum):
    """How weight codes lie in memory; the number is the version of the layout.

    ``rows-1``: 8-bit codes int8 [outputs, inputs]; narrower ones as a stream of bits along the inputs in int32 words,
    code k in the bits k·b … k·b + b − 1, lowest first. ``panels-1``: panels of 64 outputs, within a panel one int32
    word an output and step, see :mod:`bitlower.backends.tvm_kernels._packing`.
    """

    ROWS = "rows-1"
    PANELS = "panels-1"


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What all kernels have.

    Args:
        target: whose code.
        dtype: of the values that are not codes, arguments and results, and of what linears multiply; sums are float32
            always.
        dtypes: of those that have another, by name, in order; GPU kernels read and write either.
    """

    target: Target = Target.LLVM
    dtype: str = "float32"
    dtypes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for dtype in (self.dtype, *dict(self.dtypes).values()):
            if dtype not in FLOATS:
                raise BitlowerError(f"kernels compute in {' or '.join(FLOATS)}, not in {dtype}")

    def dtype_of(self, name: str) -> str:
        """The dtype of an argument that is no codes."""
        return dict(self.dtypes).get(name, self.dtype)

    def holding(self, dtypes: Mapping[str, str]) -> Self:
        """The same kernel with arguments of these dtypes, by name."""
        others = {name: dtype for name, dtype in dtypes.items() if dtype != self.dtype}
        return replace(self, dtypes=tuple(sorted(others.items())))

    @property
    def family(self) -> str:
        """What the kernel does, in a word."""
        return type(self).__name__.removesuffix("Spec").lower()

    @property
    def name(self) -> str:
        """A name for the function: the family and a digest of the whole spec."""
        return f"bitlower_{self.family}_{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class LinearSpec(KernelSpec):
    """``round(function(x · Wᵀ + bias)) + residual``, rounded to ``output`` codes if that is given.

    Args:
        inputs: columns of the weight, K.
        outputs: its rows, N.
        weight: grid and granularity (tensor, channel, row-group or group) of the weight; None: it is float, as ``x``.
        activation: those of ``x``, which then comes as codes; None: ``x`` is float. Per tensor, per token, or embedding
            groups (then the product is a sum over them: PEG).
        splits: sizes of the embedding groups of ``x`` where they are not equal.
        bias: whether there is one.
        function: one of :data:`FUNCTIONS`.
        rounded: static quantizer whose rounding the product gets before the residual is added; None: it gets none.
        residual: whether [rows, outputs] is added.
        residual_codes: quantizer of the residual, which then comes as codes; None: it is float.
        output: quantizer of the result (static); None: float.
        keep: one of :data:`KEEP`, where there are codes.
        layout: of the weight codes.
        buckets: the row counts that the function has code of its own for, ascending; it picks by the rows at run time.
    """

    inputs: int
    outputs: int
    weight: QuantSpec | None
    activation: QuantSpec | None = None
    splits: tuple[int, ...] = ()
    bias: bool = False
    function: str = ""
    rounded: QuantSpec | None = None
    residual: bool = False
    residual_codes: QuantSpec | None = None
    output: QuantSpec | None = None
    keep: str = ""
    layout: Layout = Layout.ROWS
    buckets: tuple[int, ...] = (1, 2, 4, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_function(self.function)
        if self.weight is not None:
            _check_kind(self.weight, _WEIGHT_KINDS, "a weight")
            if self.weight.grid.bits > 8:
                raise BitlowerError(f"weights of kernels have at most 8 bits, not {self.weight.grid.bits}")
        elif self.activation is not None:
            raise BitlowerError("kernels have no product of codes with float weights", hint="quantize the weight")
        if self.activation is not None:
            _check_kind(self.activation, (*_STATIC_KINDS, "token"), "an activation")
            _check_codes(self.activation)
        for static in (self.output, self.rounded):
            if static is not None:
                _check_kind(static, _STATIC_KINDS, "the output of a linear")
                _check_codes(static)
        _check_operand(self.residual_codes, self.residual, "residual")
        _check_keep(self.keep, self.output)
        if sum(self.splits) not in (0, self.inputs):
            raise BitlowerError(f"splits of {list(self.splits)} do not add up to {self.inputs} inputs")
        if not self.buckets or self.buckets[0] != 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise BitlowerError(f"buckets {list(self.buckets)} must rise from 1")
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
        narrow = self.width < 8 or (grid.symmetric and self.centre <= 1 << 7 and grid.quant_max - self.centre < 1 << 7)
        if not narrow and (self.activation is not None or grid.symmetric):
            raise BitlowerError(f"kernels have no integer product for weights in {grid}", hint="use symmetric weights")

    @property
    def width(self) -> int:
        """Bits that a stored weight takes: 2, 3, 4 or 8 where it is codes."""
        if self.weight is None:
            return int(self.dtype.removeprefix("float"))
        bits = self.weight.grid.bits
        return bits if bits in (2, 3, 4) else 8

    @property
    def step(self) -> int:
        """Consecutive inputs that are packed together in panels."""
        return {2: 16, 3: 32, 4: 8, 8: 4}.get(self.width, 1)

    @property
    def group(self) -> int:
        """Inputs that share a stored scale of the weight."""
        if self.weight is None:
            return self.inputs
        granularity = self.weight.granularity
        return granularity.block_size(self.inputs) if granularity.kind == "group" else self.inputs

    @property
    def grouped(self) -> bool:
        """Whether an output has several weight scales."""
        return self.group != self.inputs

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
    def activation_sizes(self) -> tuple[int, ...]:
        """How many consecutive inputs share a scale of ``x``, group by group."""
        if self.splits:
            return self.splits
        count = _count(self.activation, self.inputs) if self.activation else 1
        return (self.inputs // count,) * count

    @property
    def segment_sizes(self) -> tuple[int, ...]:
        """The longest runs of inputs within which neither scale changes."""
        ends = {self.group * (i + 1) for i in range(self.inputs // self.group)}
        total = 0
        for size in self.activation_sizes:
            total += size
            ends.add(total)
        rising = [0, *sorted(ends)]
        return tuple(b - a for a, b in pairwise(rising))


@dataclass(frozen=True, kw_only=True)
class NormSpec(KernelSpec):
    """LayerNorm or RMSNorm over the last axis, with the residual sum before it and the rounding after it, in one go.

    Args:
        columns: length of a row.
        kind: ``layer`` or ``rms``.
        epsilon: added to the variance (the mean square).
        x_codes: quantizer of ``x``, which then comes as codes; None: it is float.
        residual: whether a second value is added first.
        residual_codes: quantizer of the residual; None: it is float.
        bias: whether there is one after the weight.
        output: quantizer of the result, static or per token; None: float.
        keep: one of :data:`KEEP`, where there are codes (the residual stream of post-norm models).
        keep_sum: give the sum before the norm too (the residual stream of pre-norm models).
    """

    columns: int
    kind: str
    epsilon: float
    x_codes: QuantSpec | None = None
    residual: bool = False
    residual_codes: QuantSpec | None = None
    bias: bool = False
    output: QuantSpec | None = None
    keep: str = ""
    keep_sum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("layer", "rms"):
            raise BitlowerError(f"unknown norm {self.kind!r}", hint=nearest(self.kind, ("layer", "rms")))
        _check_output(self.output)
        _check_operand(self.x_codes, True, "x")
        _check_operand(self.residual_codes, self.residual, "residual")
        _check_keep(self.keep, self.output)


@dataclass(frozen=True, kw_only=True)
class ActivationSpec(KernelSpec):
    """``function(x + bias) · gate + residual``, rounded to codes: one pass over a row.

    Args:
        columns: length of a row of the result.
        output: quantizer of the result, static or per token; None: float.
        function: one of :data:`FUNCTIONS`; with the identity this is a quantizer alone.
        x_codes: quantizer of ``x``, which then comes as codes; None: it is float.
        bias: whether one is added to ``x`` first.
        gate: ``""``, ``separate`` (a second argument) or ``halves`` (the second half of rows twice as long).
        gate_codes: quantizer of a separate gate; None: it is float.
        residual: whether a value is added at the end.
        residual_codes: quantizer of the residual; None: it is float.
        keep: one of :data:`KEEP`, where there are codes.
    """

    columns: int
    output: QuantSpec | None = None
    function: str = ""
    x_codes: QuantSpec | None = None
    bias: bool = False
    gate: str = ""
    gate_codes: QuantSpec | None = None
    residual: bool = False
    residual_codes: QuantSpec | None = None
    keep: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_function(self.function)
        if self.gate not in ("", "separate", "halves"):
            raise BitlowerError(f"unknown gate {self.gate!r}", hint=nearest(self.gate, ("separate", "halves")))
        _check_output(self.output)
        _check_operand(self.x_codes, True, "x")
        _check_operand(self.gate_codes, self.gate == "separate", "gate")
        _check_operand(self.residual_codes, self.residual, "residual")
        _check_keep(self.keep, self.output)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec(KernelSpec):
    """Rows of a quantized table, dequantized as they are read.

    Args:
        entries: rows of the table.
        columns: length of a row.
        weight: grid and granularity (tensor, channel, row-group or group) of the table.
    """

    entries: int
    columns: int
    weight: QuantSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table()

    def table(self) -> LinearSpec:
        """The table as the weight of a linear: that is how it is packed."""
        return LinearSpec(
            target=self.target, dtype=self.dtype, inputs=self.columns, outputs=self.entries, weight=self.weight
        )


def static_scales(output: QuantSpec, columns: int) -> int:
    """How many stored scales a static quantizer of rows of ``columns`` has; each is for as many columns."""
    return _count(output, columns)


def _count(spec: QuantSpec, columns: int) -> int:
    match spec.granularity.kind:
        case "tensor" | "token":
            return 1
        case "embedding-group":
            return spec.granularity.scale_shape((1, columns))[-1]
        case _:
            return columns


def _check_function(name: str) -> None:
    if name not in FUNCTIONS:
        raise BitlowerError(f"kernels have no function {name!r}", hint=nearest(name, [f for f in FUNCTIONS if f]))


def _check_kind(spec: QuantSpec, known: tuple[str, ...], what: str) -> None:
    granularity: Granularity = spec.granularity
    axis = {"channel": (0,), "group": (-1, 1)}.get(granularity.kind, (granularity.axis,))
    if granularity.kind not in known or granularity.axis not in axis:
        raise BitlowerError(f"kernels do not take {what} quantized {granularity}", hint=f"known: {', '.join(known)}")


def _check_codes(spec: QuantSpec) -> None:
    grid: Grid = spec.grid
    if grid.bits > 8:
        raise BitlowerError(f"codes between kernels have at most 8 bits, not {grid.bits}")


def _check_output(output: QuantSpec | None) -> None:
    if output is not None:
        _check_kind(output, (*_STATIC_KINDS, "token"), "a result")
        _check_codes(output)


def _check_operand(codes: QuantSpec | None, present: bool, what: str) -> None:
    if codes is None:
        return
    if not present:
        raise BitlowerError(f"the kernel has no {what}, but a quantizer of it")
    _check_kind(codes, (*_STATIC_KINDS, "token"), f"the {what}")
    _check_codes(codes)


def _check_keep(keep: str, output: QuantSpec | None) -> None:
    if keep not in KEEP:
        raise BitlowerError(f"kernels keep no {keep!r} values", hint=nearest(keep, [k for k in KEEP if k]))
    if keep and output is None:
        raise BitlowerError(f"without codes there is nothing to keep {keep} values beside", hint="leave `keep` out")
