"""One step of a causal language model: new tokens and the cache of those before, to logits and the longer cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.fit import Batch
from bitlower.ir.program import Program
from bitlower.ir.stages import next_past
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.ir.tokens import MASK, SEQUENCE, TOKENS, is_past, positions

Step = Callable[[Batch, Any], tuple[torch.Tensor, Any]]
"""Takes ``input_ids`` ``[batch, sequence]``, ``attention_mask`` ``[batch, past + sequence]`` and ``position_ids``, and
a cache (None: empty). Returns logits ``[batch, sequence, vocabulary]`` and the cache with the new tokens in it."""
Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Takes inputs by name and returns outputs by name; what it returns for a cache, it takes for a past."""


def has_cache(program: Program) -> bool:
    """Whether the program takes what earlier tokens left: keys and values, or states."""
    return any(map(is_past, program.inputs))


def check_causal(program: Program) -> None:
    """See that ``program`` is a causal language model.

    Raises:
        BitlowerError: it is none.
    """
    if "logits" not in [s.name for s in program.outputs] or TOKENS not in [s.name for s in program.inputs]:
        raise BitlowerError(f"{program.source or 'the model'} is no causal language model", hint="is the task right?")
    if program.task and program.task != TEXT_GENERATION:
        raise BitlowerError(f"{program.source or 'the model'} is for {program.task}, not for {TEXT_GENERATION}")


def decoder_step(program: Program, run: Run) -> Step:
    """The step of ``program``, a causal language model that ``run`` computes.

    The cache stays as ``run`` returns it, in the memory of what computes. A model without a cache runs all tokens
    again; its cache is the tokens so far.

    Raises:
        BitlowerError: it is no causal language model.
    """
    check_causal(program)

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        outputs = run(_step_inputs(program, feed) | (cache or {}))
        return as_tensor(outputs["logits"]), next_past(outputs)

    return with_memory(step, has_cache(program))


def _step_inputs(program: Program, feed: Batch) -> dict[str, Any]:
    """What ``program`` takes of ``feed``; a mask of the step's own tokens where it takes no other."""
    inputs = {spec.name: feed[spec.name] for spec in program.inputs if spec.name in feed}
    for spec in program.inputs:
        if spec.name == MASK and spec.type.shape[1:] == (SEQUENCE,):
            inputs[MASK] = feed[MASK][:, -feed[TOKENS].shape[1] :]
    return inputs


def with_memory(step: Step, cached: bool) -> Step:
    """``step`` itself; for a model without a cache, one whose cache is the tokens so far, which it runs all again."""
    if cached:
        return step

    def whole(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        ids, mask = feed[TOKENS], feed[MASK]
        tokens = ids if cache is None else torch.cat([cache, ids], dim=1)
        logits, _ = step({TOKENS: tokens, MASK: mask, "position_ids": positions(mask)}, None)
        return logits[:, -ids.shape[1] :], tokens

    return whole


def reordered(cache: Any, rows: torch.Tensor) -> Any:
    """``cache`` with its rows as ``rows`` ``[batch]`` int64 says: beams go on from others' pasts."""
    if isinstance(cache, Mapping):
        return {name: as_tensor(value).index_select(0, rows) for name, value in cache.items()}
    if isinstance(cache, torch.Tensor):
        return cache.index_select(0, rows)
    cache.reorder_cache(rows)
    return cache


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor of whatever runtime as one of torch."""
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value.numpy())
