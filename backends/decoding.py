"""Decoding for verification: a batch run again in steps, each with what those before left (keys and values, states)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from bitlower.ir import Batch, Program
from bitlower.ir.decoder_step import has_cache
from bitlower.ir.observe import run
from bitlower.ir.stages import next_past
from bitlower.ir.tokens import SEQUENCE, TOTAL


def cached_steps(
    program: Program, batch: Batch, outputs: Callable[[Batch], Mapping[str, torch.Tensor]] | None = None
) -> Iterator[Batch]:
    """The tokens of ``batch`` in steps after a first one (half of them, all others but one, one), with their past.

    The past is the program's own, from ``outputs`` if they are known there. Nothing for programs without a cache, or
    where there is one token only.
    """
    count = _length(program, batch)
    if not has_cache(program) or count < 2:
        return
    half = (count + 1) // 2
    step = _cut(program, program.complete(batch), 0, half, {})
    for start, stop in ((half, count - 1), (count - 1, count)):
        if start < stop:
            results = outputs(step) if outputs else run(program, step)
            step = _cut(program, batch, start, stop, next_past(results))
            yield step


def visible(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    """Of a decoder's outputs, by name: where the tokens are no padding, to broadcast over the output.

    What comes out at padding is nobody's: a row of attention that may look at nothing is 0 in torch, and the mean of
    all values in onnxruntime.
    """
    spec = next((spec for spec in program.inputs if spec.type.shape[1:] == (TOTAL,)), None)
    if spec is None or bool(batch[spec.name].all()):
        return {}
    mask = batch[spec.name].bool()
    shown = {}
    for output in program.outputs:
        shape = output.type.shape
        for dim, columns in ((TOTAL, mask), (SEQUENCE, mask[:, -_length(program, batch) :])):
            if dim in shape and shape[0] == spec.type.shape[0]:
                sizes = [1] * len(shape)
                sizes[0], sizes[shape.index(dim)] = columns.shape
                shown[output.name] = columns.reshape(sizes)
                break
    return shown


def _length(program: Program, batch: Batch) -> int:
    """The tokens in a row of ``batch``; 0 if the program does not say which axis they lie along."""
    for spec in program.inputs:
        if SEQUENCE in spec.type.shape and spec.name in batch:
            return batch[spec.name].shape[spec.type.shape.index(SEQUENCE)]
    return 0


def _cut(program: Program, batch: Batch, start: int, stop: int, caches: Batch) -> dict[str, torch.Tensor]:
    """The tokens from ``start`` to ``stop``, after those that ``caches`` hold."""
    step = {}
    for spec in program.inputs:
        value = caches[spec.name] if spec.name in caches else batch[spec.name]
        for axis, dim in enumerate(spec.type.shape):
            if dim == SEQUENCE:
                value = value.narrow(axis, start, stop - start)
            elif dim == TOTAL:
                value = value.narrow(axis, 0, stop)
        step[spec.name] = value.contiguous()
    return step
