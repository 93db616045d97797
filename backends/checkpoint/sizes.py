"""The bytes that tensors take in a checkpoint; see :mod:`bitlower.backends.sizes`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.backends.checkpoint.format import Format, packed_as
from bitlower.backends.sizes import ENTRY_BYTES, stored_tensors
from bitlower.ir import Program, Quantizer
from bitlower.ir.dataflow import EMBEDDING


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes in the format ``form``; ``width``: bytes of a number that stays float."""

    form: Format
    width: int = 2

    def quantized(self, quantizer: Quantizer, shape: tuple[int, ...], readers: Collection[fx.Node] = ()) -> int:
        """Bytes of codes, scales and zero points of a linear's weight; tables are written in float."""
        spec = quantizer.spec
        if len(shape) != 2 or any(node.target in EMBEDDING for node in readers):
            return self.width * math.prod(shape)
        rows, columns = shape
        count = math.prod(spec.granularity.scale_shape(shape))
        groups = max(1, count // rows)
        return self.form.stored_bytes(packed_as(spec, columns), (rows, columns), (count, groups), self.width)

    def floats(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        """Floats have ``width`` bytes."""
        return tensor.numel() * (self.width if tensor.is_floating_point() else tensor.element_size())

    def overhead(self, program: Program) -> int:
        """Bytes of the headers of safetensors files."""
        return ENTRY_BYTES * stored_tensors(program)
