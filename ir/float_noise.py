"""What float arithmetic explains of an output's error: the Program's own outputs when its linears round otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from bitlower.ir.dataflow import CONVOLUTION, convolutions, linears
from bitlower.ir.fit import Batch
from bitlower.ir.observe import observe
from bitlower.ir.operators import graph_results
from bitlower.ir.program import Program

ROUNDING = 2.0**-22
"""By how much sums of products in float32 differ with their order, over the largest result of a row."""


def shaken(program: Program, batch: Batch, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs on one batch when each result of each linear is off by up to ``ROUNDING`` of its row's largest.

    Errors of rounding go with the terms of a sum and not with what is left of them, so a model whose residual stream
    holds a few large values shows far more of them in its outputs than another.
    """
    results = {spec.name: node for spec, node in zip(program.outputs, graph_results(program.graph), strict=True)}
    values = values_given(program, batch, results.values(), rounding=ROUNDING, seed=seed)
    return {name: values[node] for name, node in results.items()}


def values_given(
    program: Program,
    batch: Batch,
    nodes: Iterable[fx.Node],
    known: Mapping[fx.Node, torch.Tensor] | None = None,
    *,
    rounding: float = 0.0,
    seed: int = 0,
) -> dict[fx.Node, torch.Tensor]:
    """The values of ``nodes`` on one batch.

    Args:
        program: is run.
        batch: inputs by name.
        nodes: of its graph.
        known: values that take the place of those of the program.
        rounding: each result of each linear and convolution is off by up to this part of its row's largest.
        seed: of how far.
    """
    known, watched = known or {}, set(nodes)
    generator = torch.Generator().manual_seed(seed)
    shaky = {*linears(program.graph), *convolutions(program.graph)} if rounding else set()
    values: dict[fx.Node, torch.Tensor] = {}

    def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        if node in known:
            value = known[node].to(value.dtype).expand_as(value)
        elif node in shaky:
            off = 2 * torch.rand(value.shape, generator=generator) - 1
            channels = 1 if node.target in CONVOLUTION else -1
            value = value + rounding * value.abs().amax(channels, keepdim=True) * off
        if node in watched:
            values[node] = value
        return value

    observe(program, {*known, *shaky, *watched}, [batch], look)
    return values
