"""What kernels over whole rows compute: norms, and activation functions with what is rounded after them."""

from __future__ import annotations

from dataclasses import dataclass

from bitlower.backends.tvm_kernels.spec.base import (
    KernelSpec,
    check_activation,
    check_keep,
    check_operand,
    check_output,
    operand_label,
)
from bitlower.ir import BitlowerError, QuantSpec, nearest


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
        check_output(self.output)
        check_operand(self.x_codes, True, "x")
        check_operand(self.residual_codes, self.residual, "residual")
        check_keep(self.keep, self.output)

    @property
    def label(self) -> str:
        """For example ``rms_768_u8token``."""
        return "_".join(filter(None, [self.kind, str(self.columns), operand_label(self.output, self.dtype)]))


@dataclass(frozen=True, kw_only=True)
class ActivationSpec(KernelSpec):
    """``activation(x + bias) · gate + residual``, rounded to codes: one pass over a row.

    Args:
        columns: length of a row of the result.
        output: quantizer of the result, static or per token; None: float.
        activation: one of :data:`~bitlower.backends.tvm_kernels.spec.base.ACTIVATION_FUNCTIONS`; with the identity this
            is a quantizer alone.
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
    activation: str = ""
    x_codes: QuantSpec | None = None
    bias: bool = False
    gate: str = ""
    gate_codes: QuantSpec | None = None
    residual: bool = False
    residual_codes: QuantSpec | None = None
    keep: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.activation)
        if self.gate not in ("", "separate", "halves"):
            raise BitlowerError(f"unknown gate {self.gate!r}", hint=nearest(self.gate, ("separate", "halves")))
        check_output(self.output)
        check_operand(self.x_codes, True, "x")
        check_operand(self.gate_codes, self.gate == "separate", "gate")
        check_operand(self.residual_codes, self.residual, "residual")
        check_keep(self.keep, self.output)

    @property
    def label(self) -> str:
        """For example ``silu_3072_u8token``."""
        return "_".join(filter(None, [self.activation, str(self.columns), operand_label(self.output, self.dtype)]))
