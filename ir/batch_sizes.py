"""Batches of other sizes: a part of one, or one whose values take no more than so many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from bitlower.ir.fit import Batch
from bitlower.ir.program import Program
from bitlower.ir.tokens import BATCH, MASK, PICTURES, SAMPLES, TOKENS, is_past
from bitlower.ir.types import TensorType

ROWS = 2
"""Rows of a small batch."""
LENGTH = 16
"""Tokens of each of its rows."""
SOUND = 6_000
"""Samples of a sound in it: more than convolutions make the first few frames of."""
LARGEST_OUTPUTS = 128 << 20
"""Bytes of the outputs of a batch on which two programs, or a program and a runtime, are compared: what a model with
hundreds of thousands of tokens says of each position takes gigabytes, several times over."""
_SUM = " + "


def small_batch(program: Program, batch: Batch, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """A part of ``batch``: of symbolic dimensions, ``batch`` is cut to ``rows`` and the others to ``length``."""
    inputs = dict(zip((spec.name for spec in program.inputs), program.arguments(batch), strict=True))
    small = {spec.name: _cut(inputs[spec.name], spec.type.shape, rows, length) for spec in program.inputs}
    if any(small[name].shape != inputs[name].shape for name in small):
        keep_ends(program, small, inputs)
    return small


def keep_ends(program: Program, batch: dict[str, torch.Tensor], whole: Batch) -> None:
    """Let each text of ``batch`` end with its own last token, and have it once: an encoder may look for a text's end.

    Args:
        program: what the batch is for; nothing is done for a decoder.
        batch: cut or repeated from ``whole``, row k from row k modulo its rows; its tokens are changed.
        whole: the batch before.
    """
    ids, before, mask = whole.get(TOKENS), whole.get(MASK), batch.get(MASK)
    if ids is None or before is None or mask is None or any(map(is_past, program.inputs)):
        return
    if ids.dim() != 2 or before.shape != ids.shape or mask.shape != batch[TOKENS].shape:
        return
    tokens = batch[TOKENS] = batch[TOKENS].clone()
    for row in range(len(tokens)):
        text = ids[row % len(ids)][before[row % len(ids)].bool()]
        shown = mask[row].nonzero()[:, 0]
        if len(text) and len(shown) and text[0] != text[-1]:
            tokens[row, shown[tokens[row, shown] == text[-1]]] = text[0]
            tokens[row, shown[-1]] = text[-1]


def _cut(tensor: torch.Tensor, shape: tuple[int | str, ...], rows: int, length: int) -> torch.Tensor:
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            most = rows if dim in (BATCH, PICTURES) else max(length, SOUND) if dim == SAMPLES else length
            tensor = tensor.narrow(axis, 0, min(tensor.shape[axis], most))
    return tensor.clone(memory_format=torch.contiguous_format)


def with_small_outputs(program: Program, batch: Batch) -> Batch:
    """``batch``, or so many tokens of each of its rows that the outputs take no more than ``LARGEST_OUTPUTS``."""
    return within(program, batch, [spec.type for spec in program.outputs], LARGEST_OUTPUTS)


def within(program: Program, batch: Batch, types: Iterable[TensorType], limit: int) -> Batch:
    """``batch``, or so many tokens of each of its rows that values of ``types`` take no more than ``limit`` bytes.

    Where what does not grow with the tokens (frames of sound) takes more, fewer rows.
    """
    types = list(types)
    sizes = symbolic_sizes(program, batch)
    size = sum(kind.dtype.itemsize * math.prod(_size(dim, sizes) for dim in kind.shape) for kind in types)
    longest = max(sizes.values(), default=0)
    if size <= limit:
        return batch
    frames = [kind for kind in types if all(isinstance(dim, int) or dim == BATCH for dim in kind.shape)]
    fixed = sum(kind.dtype.itemsize * math.prod(_size(dim, sizes) for dim in kind.shape) for kind in frames)
    if fixed > limit:
        return small_batch(program, batch, max(1, sizes.get(BATCH, 1) * limit // fixed), longest)
    return small_batch(program, batch, longest, max(LENGTH, longest * limit // size))


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension in a batch of ``sizes``; 1 where none of them says it."""
    return dim if isinstance(dim, int) else wanted_size(dim, sizes) or 1


def wanted_size(dim: int | str, wanted: Mapping[str, int]) -> int | None:
    """The size of a dimension: that of its part, for ``past + sequence``, where the past is empty."""
    parts = [wanted[part] for part in dim.split(_SUM) if part in wanted] if isinstance(dim, str) else []
    return sum(parts) if parts else None


def symbolic_sizes(program: Program, batch: Batch) -> dict[str, int]:
    """The sizes of symbolic dimensions that stand alone in an input, but for that of a past."""
    return {
        dim: batch[spec.name].shape[axis]
        for spec in program.inputs
        if spec.name in batch and not is_past(spec)
        for axis, dim in enumerate(spec.type.shape)
        if isinstance(dim, str) and _SUM not in dim
    }
