"""How long linears take on a target, estimated by calculation: nothing here was measured on the program.

A linear of K inputs and N outputs on R rows takes the longer of ``bytes / bandwidth`` and ``2 R K N / rate`` (the
roofline, Williams et al. 2009). The bytes are those of its weight with its scales, of its input and of its output, each
once. The rate is that of the product that the widths of weight and input together allow:

- both codes of at most 8 bits: integers; weight codes of fewer than 8 bits are unfolded on the way,
- anything else: floats; weight codes are dequantized on the way. Activation codes of 16 bits have no integer product on
  any of these targets, nor have 8-bit weights with zero points.

Weight codes of 2, 3 and 4 bits are stored densely, those of 5 to 8 in a byte, wider ones in two; activation codes of at
most 8 bits in a byte, wider ones in two. Outputs leave as floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitlower.ir import BitlowerError, nearest

INTEGER, FLOAT = "W8A8", "W16A16"
PRODUCTS = (INTEGER, *("W4A8", "W3A8", "W2A8"), *("W8A16", "W4A16", "W3A16", "W2A16"), FLOAT)
"""Products with rates of their own: stored bits of the weight and of the activation; 16 means floats."""
_PACKED = (2, 3, 4)
"""Bits that runtimes store packed; others take whole bytes."""
_KEYS = ("name", "bandwidth", "float-bytes", "rates")
_FLOAT_SIZES = (2, 4)
"""Bytes of half and single precision."""
_SCALE_BYTES = 4
"""Scales are float32."""
_PICO = 1e12
"""Picoseconds a second: times are whole numbers, so that budgets add up exactly."""


@dataclass(frozen=True)
class Roofline:
    """A target by a few numbers.

    Args:
        name: of the target.
        bandwidth: of its memory, bytes a second.
        float_bytes: of a float that is not a code: 2 (float16) or 4 (float32).
        rates: operations a second (a multiplication and an addition are two) of :data:`PRODUCTS`. ``W8A8`` and
            ``W16A16`` have to be there; other widths take the rate of that one of the two that they are a kind of.
    """

    name: str
    bandwidth: float
    float_bytes: int
    rates: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        numbers = {"bandwidth": self.bandwidth, **dict(self.rates)}
        for key, value in numbers.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise BitlowerError(f"target {self.name}: {key} must be a number above 0, not {value!r}")
        for product, _ in self.rates:
            if product not in PRODUCTS:
                raise BitlowerError(f"target {self.name}: unknown product {product!r}", hint=nearest(product, PRODUCTS))
        missing = {INTEGER, FLOAT} - numbers.keys()
        if missing:
            raise BitlowerError(f"target {self.name} has no rate for {' and '.join(sorted(missing))}")
        if self.float_bytes not in _FLOAT_SIZES:
            raise BitlowerError(f"target {self.name}: float-bytes is {self.float_bytes!r}", hint="2 or 4")

    @classmethod
    def parse(cls, name: str) -> Roofline:
        """The target called ``name``.

        Raises:
            BitlowerError: there is none.
        """
        if name not in TARGETS:
            hint = f"{nearest(name, TARGETS)}; or give the numbers of yours"
            raise BitlowerError(f"unknown target {name!r}", hint=hint)
        return TARGETS[name]

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Roofline:
        """The target of a mapping: ``name``, ``bandwidth``, ``float-bytes``, and ``rates`` by product.

        Raises:
            BitlowerError: a key is missing or unknown, or a number makes no sense.
        """
        for key in form:
            if key not in _KEYS:
                raise BitlowerError(f"unknown key {key!r} of a target", hint=nearest(str(key), _KEYS))
        for key in _KEYS:
            if key not in form:
                raise BitlowerError(f"a target needs the key {key!r}", hint=f"it has {', '.join(_KEYS)}")
        rates = form["rates"]
        if not isinstance(rates, Mapping):
            raise BitlowerError(f"the rates of a target are a mapping, not {rates!r}")
        return cls(str(form["name"]), form["bandwidth"], form["float-bytes"], tuple(sorted(rates.items())))

    def to_dict(self) -> dict[str, Any]:
        """The mapping; the inverse of :meth:`from_dict`."""
        return dict(zip(_KEYS, (self.name, self.bandwidth, self.float_bytes, dict(self.rates)), strict=True))

    def rate(self, product: str) -> float:
        """Operations a second of ``product``."""
        known = dict(self.rates)
        return known.get(product, known[INTEGER if product.endswith("A8") else FLOAT])

    def picoseconds(self, linear: Linear, rows: int, weight: int | None, activation: int | None) -> int:
        """How long ``linear`` takes on ``rows`` rows with these bits of codes; None: floats."""
        traffic = linear.weight_bytes(weight, self.float_bytes)
        traffic += rows * (linear.inputs * code_bytes(activation, self.float_bytes) + linear.outputs * self.float_bytes)
        work = 2 * rows * linear.inputs * linear.outputs
        rate = self.rate(linear.product(weight, activation))
        return max(1, round(_PICO * max(traffic / self.bandwidth, work / rate)))


TARGETS = {
    "a100": Roofline("a100", 2.039e12, 2, ((INTEGER, 624e12), (FLOAT, 312e12))),
    "h100": Roofline("h100", 3.35e12, 2, ((INTEGER, 1979e12), (FLOAT, 989e12))),
}
"""A100 80GB SXM and H100 SXM by NVIDIA's data sheets ("NVIDIA A100 Tensor Core GPU", "NVIDIA H100 Tensor Core GPU"):
bandwidth of the memory, INT8 and FP16 rates of the tensor cores without sparsity. Weight codes of fewer than 8 bits are
unfolded to bytes, and multiplied at the rate of these."""


@dataclass(frozen=True)
class Linear:
    """What of a linear decides its time.

    Args:
        inputs: columns of the weight.
        outputs: rows of the weight.
        scales: of the weight, if it has codes.
        symmetric: whether its codes have no zero points.
    """

    inputs: int
    outputs: int
    scales: int = 0
    symmetric: bool = True

    def weight_bytes(self, bits: int | None, float_bytes: int) -> int:
        """Bytes of the weight at ``bits`` (None: floats): codes, scales, and zero points where there are some."""
        count = self.inputs * self.outputs
        if bits is None:
            return count * float_bytes
        stored = stored_bits(bits)
        zeros = 0 if self.symmetric else math.ceil(stored * self.scales / 8)
        return math.ceil(stored * count / 8) + _SCALE_BYTES * self.scales + zeros

    def product(self, weight: int | None, activation: int | None) -> str:
        """Which of :data:`PRODUCTS` takes weight and activation of these bits; None: floats."""
        if weight is None or weight > 8:
            return FLOAT
        stored = stored_bits(weight)
        integer = activation is not None and activation <= 8 and (stored < 8 or self.symmetric)
        return f"W{stored}A{8 if integer else 16}"


def stored_bits(bits: int) -> int:
    """Bits that a weight code takes in memory."""
    return bits if bits in _PACKED else 8 * math.ceil(bits / 8)


def code_bytes(bits: int | None, float_bytes: int) -> int:
    """Bytes that an activation takes in memory."""
    return float_bytes if bits is None else math.ceil(bits / 8)


def widest(bits: Sequence[int], *, weights: bool) -> tuple[int, ...]:
    """Of widths that take equal time, the widest: narrower ones cost loss and save nothing."""
    by_time: dict[int, int] = {}
    for width in sorted(bits):
        by_time[stored_bits(width) if weights else math.ceil(width / 8)] = width
    return tuple(by_time.values())
