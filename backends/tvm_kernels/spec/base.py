"""What all kernels have: target, dtypes, a name; and the bounds of what they compute.

A spec says everything that decides the code of a kernel, and nothing else: scales, zero points and biases are
arguments. Equal specs share one compiled kernel. The quantizers are those of the Program
(:class:`~bitlower.ir.QuantSpec`), with its numerics (:mod:`bitlower.ir.quantization.numerics`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from bitlower.backends.tvm_kernels.spec.target import GemmConfig, Target
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, nearest
from bitlower.ir.activations import IN_KERNELS

ACTIVATION_FUNCTIONS = ("", *IN_KERNELS)
"""Activation functions of an epilogue; the empty name is the identity."""
HALF = "float16"
FLOATS = ("float32", HALF)
KEEP = ("", "exact", "rounded")
"""Whether a kernel returns floats beside codes: none, the result before its rounding, or the values of its codes."""
STATIC_KINDS = ("tensor", "embedding", "embedding-group", "embedding-parts")


class NoKernel(BitlowerError):
    """What is asked for has no kernel; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """What all kernels have.

    Args:
        target: whose code.
        dtype: of the values that are not codes, arguments and results, and of what linears multiply; sums are float32
            always.
        dtypes: of those that have another, by name, in order; GPU kernels read and write either.
    """

    configured: ClassVar[bool] = False
    """Whether a :class:`~bitlower.backends.tvm_kernels.spec.target.GemmConfig` changes its code."""
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

    @classmethod
    def plan(cls, **fields: Any) -> Self | str:
        """The spec with these fields, or the reason why there is no kernel for it.

        Raises:
            BitlowerError: the fields contradict each other.
        """
        try:
            return cls(**fields)
        except NoKernel as reason:
            return str(reason)

    @property
    def label(self) -> str:
        """What tells kernels of a family apart, for readers: sizes and bits."""
        return ""

    @property
    def name(self) -> str:
        """The function's name, as profilers show it: the family, :attr:`label`, and a digest of the whole spec."""
        return function_name(self.family, self.label, self)


PREFIX = "bitlower_"
"""What the names of kernels begin with."""


def function_name(family: str, label: str, spec: object) -> str:
    """The name of a kernel, which is an identifier of C.

    Args:
        family: what it does, in a word.
        label: for readers.
        spec: what decides its code; equal ones have equal names.
    """
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:8]
    return PREFIX + "_".join(part for part in (family, label, digest) if part).replace("-", "_")


def kernel_name(spec: KernelSpec, config: GemmConfig) -> str:
    """The name of a kernel of ``spec``; that of a configuration which is not its target's own tells it apart."""
    if not spec.configured or config == spec.target.gemm:
        return spec.name
    return function_name(spec.family, spec.label, (spec, config))


def operand_label(codes: QuantSpec | None, dtype: str) -> str:
    """How an operand is held, in a name: ``u8token``, ``s4tensor``, ``f32``."""
    if codes is None:
        return f"f{dtype.removeprefix('float')}"
    return f"{'s' if codes.grid.signed else 'u'}{codes.grid.bits}{codes.granularity.kind}"


def static_scales(spec: QuantSpec, columns: int) -> int:
    """How many stored scales a quantizer of rows of ``columns`` has; each is for as many columns."""
    match spec.granularity.kind:
        case "tensor" | "token":
            return 1
        case "embedding-group":
            return spec.granularity.scale_shape((1, columns))[-1]
        case _:
            return columns


def check_activation(name: str) -> None:
    """See that kernels have an activation function.

    Raises:
        BitlowerError: they have not; the nearest match is named.
    """
    if name not in ACTIVATION_FUNCTIONS:
        raise BitlowerError(
            f"kernels have no activation {name!r}", hint=nearest(name, [f for f in ACTIVATION_FUNCTIONS if f])
        )


def check_kind(spec: QuantSpec, known: tuple[str, ...], what: str) -> None:
    """See that a quantizer has one of the ``known`` granularities, along the axis that kernels go.

    Raises:
        NoKernel: it has another.
    """
    granularity: Granularity = spec.granularity
    axis = {"channel": (0,), "group": (-1, 1)}.get(granularity.kind, (granularity.axis,))
    if granularity.kind not in known or granularity.axis not in axis:
        raise NoKernel(f"kernels do not take {what} quantized {granularity}", hint=f"known: {', '.join(known)}")


def check_codes(spec: QuantSpec) -> None:
    """See that codes fit a byte.

    Raises:
        NoKernel: they do not.
    """
    grid: Grid = spec.grid
    if grid.bits > 8:
        raise NoKernel(f"codes between kernels have at most 8 bits, not {grid.bits}")


def check_output(output: QuantSpec | None) -> None:
    """See that rows can be rounded by a quantizer, static or per token.

    Raises:
        NoKernel: they cannot.
    """
    if output is not None:
        check_kind(output, (*STATIC_KINDS, "token"), "a result")
        check_codes(output)


def check_operand(codes: QuantSpec | None, present: bool, what: str) -> None:
    """See that an operand can come as codes.

    Raises:
        NoKernel: it cannot.
        BitlowerError: it is not there.
    """
    if codes is None:
        return
    if not present:
        raise BitlowerError(f"the kernel has no {what}, but a quantizer of it")
    check_kind(codes, (*STATIC_KINDS, "token"), f"the {what}")
    check_codes(codes)


def check_keep(keep: str, output: QuantSpec | None) -> None:
    """See that a kernel can return these floats beside its codes.

    Raises:
        BitlowerError: there are no such, or no codes.
    """
    if keep not in KEEP:
        raise BitlowerError(f"kernels keep no {keep!r} values", hint=nearest(keep, [k for k in KEEP if k]))
    if keep and output is None:
        raise BitlowerError(f"without codes there is nothing to keep {keep} values beside", hint="leave `keep` out")
