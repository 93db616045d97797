"""The bytes that tensors take in a library; see :mod:`bitlower.backends.sizes`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import fx

from bitlower.backends.tvm_kernels.spec.arguments import Argument, weight_arguments
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec, table_spec
from bitlower.ir import BitlowerError, Granularity, Grid, Program, Quantizer, QuantSpec
from bitlower.ir.dataflow import EMBEDDING, LINEAR
from bitlower.ir.stages import is_encoder_decoder

_FLOAT = 4
CODE_BYTES = 300_000
"""Bytes of the machine code of a library, beside the weights: about that of encoders and decoders alike."""


def linear_bytes(shape: tuple[int, int], weight: QuantSpec, x_quant: QuantSpec | None = None) -> int:
    """Those of a linear's weight ``[N, K]`` with scales, zero points and sums, in the layout for CPUs.

    Where there is no kernel for it, the weight is there in float32.
    """
    try:
        spec = LinearSpec(k=shape[1], n=shape[0], weight=weight, x_quant=x_quant)
    except BitlowerError:
        return _FLOAT * prod(shape)
    if all(size % spec.step == 0 for size in spec.segment_sizes):
        spec = replace(spec, layout=Layout.PANELS)
    return _bytes(weight_arguments(spec))


def table_bytes(shape: tuple[int, int], weight: QuantSpec) -> int:
    """Those of an embedding table ``[entries, columns]`` with scales and zero points."""
    return _bytes(weight_arguments(table_spec(shape, weight)))


def _bytes(arguments: Iterable[Argument]) -> int:
    sizes = [prod(size or 1 for size in a.shape) for a in arguments]
    return sum(size * np.dtype(a.dtype).itemsize for size, a in zip(sizes, arguments, strict=True))


@dataclass(frozen=True)
class LibrarySizes:
    """Sizes in a library; ``halves``: floats are multiplied in float16, and matrices kept so."""

    weights_only: bool = False
    halves: bool = False

    def quantized(self, quantizer: Quantizer, shape: tuple[int, ...], readers: Collection[fx.Node] = ()) -> int:
        """Bytes for linears, for look-ups, or for both; what is read otherwise is stored in float32."""
        if len(shape) != 2:
            return _FLOAT * prod(shape)
        x_quant = None if self.weights_only else QuantSpec(Grid(8), Granularity.per_tensor())
        linear = any(node.target in LINEAR for node in readers)
        table = any(node.target in EMBEDDING for node in readers)
        pair, spec = (shape[0], shape[1]), quantizer.spec
        return (linear_bytes(pair, spec, x_quant) if linear else 0) + (table_bytes(pair, spec) if table else 0)

    def floats(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        """Bytes of a tensor; one that is a table and a head is there twice."""
        kinds = {node.target in EMBEDDING for node in readers if node.target in LINEAR | EMBEDDING}
        size = _FLOAT if tensor.is_floating_point() else tensor.element_size()
        if self.halves and kinds and tensor.is_floating_point() and tensor.dim() == 2:
            size = 2
        return tensor.numel() * size * max(len(kinds), 1)

    def overhead(self, program: Program) -> int:
        """Bytes of machine code; an encoder-decoder has two functions."""
        return CODE_BYTES * (2 if is_encoder_decoder(program) else 1)
