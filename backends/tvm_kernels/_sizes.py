"""The bytes that a weight takes in a library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

import numpy as np

from bitlower.backends.tvm_kernels._arguments import Argument, weight_arguments
from bitlower.backends.tvm_kernels._spec import EmbeddingSpec, Layout, LinearSpec
from bitlower.ir import BitlowerError, QuantSpec

_FLOAT = 4


def linear_bytes(shape: tuple[int, int], weight: QuantSpec, activation: QuantSpec | None = None) -> int:
    """Those of a linear's weight ``[outputs, inputs]`` with scales, zero points and sums, in the layout for CPUs.

    Where there is no kernel for it, the weight is there in float32.
    """
    try:
        spec = LinearSpec(inputs=shape[1], outputs=shape[0], weight=weight, activation=activation)
    except BitlowerError:
        return _FLOAT * prod(shape)
    if all(size % spec.step == 0 for size in spec.segment_sizes):
        spec = replace(spec, layout=Layout.PANELS)
    return _bytes(weight_arguments(spec))


def table_bytes(shape: tuple[int, int], weight: QuantSpec) -> int:
    """Those of an embedding table ``[entries, columns]`` with scales and zero points."""
    return _bytes(weight_arguments(EmbeddingSpec(entries=shape[0], columns=shape[1], weight=weight).table()))


def _bytes(arguments: Iterable[Argument]) -> int:
    sizes = [prod(size or 1 for size in a.shape) for a in arguments]
    return sum(size * np.dtype(a.dtype).itemsize for size, a in zip(sizes, arguments, strict=True))
