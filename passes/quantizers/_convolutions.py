"""What of a scheme convolutions take: scales that factor out of their sums."""

from __future__ import annotations

from bitlower.ir import Granularity, QuantSpec, Scheme

WEIGHT, INPUT = "convolution-weight", "convolution-input"


def convolution_spec(scheme: Scheme, role: str) -> tuple[QuantSpec | None, str]:
    """What ``scheme`` says for ``role``, one of :data:`WEIGHT` and :data:`INPUT`, and why if it stays float.

    Where one of both does not fit, both stay float: the runtime would compute in float all the same.
    """
    reason = _weight_reason(scheme.spec(WEIGHT)) or _input_reason(scheme.spec(INPUT))
    spec = scheme.spec(role)
    if reason or spec is None:
        return None, reason or f"the scheme leaves {role} in float"
    return spec, ""


def _weight_reason(spec: QuantSpec | None) -> str:
    fits = (Granularity.per_tensor(), Granularity.per_channel(0))
    if spec is None or spec.granularity in fits or spec.granularity.kind == "row-group":
        return ""
    return f"the kernel of a convolution has a scale an output channel, and not {spec.granularity}"


def _input_reason(spec: QuantSpec | None) -> str:
    if spec is None or spec.granularity == Granularity.per_tensor():
        return ""
    return f"the input of a convolution has one scale, and not {spec.granularity}"
