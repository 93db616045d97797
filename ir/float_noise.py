"""What float arithmetic explains of an output's error: the Program's own outputs when its linears round otherwise."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir.dataflow import linears
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
    generator = torch.Generator().manual_seed(seed)
    shaky = set(linears(program.graph))
    results = {spec.name: node for spec, node in zip(program.outputs, graph_results(program.graph), strict=True)}
    values: dict[fx.Node, torch.Tensor] = {}

    def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        if node in shaky:
            off = 2 * torch.rand(value.shape, generator=generator) - 1
            value = value + ROUNDING * value.abs().amax(-1, keepdim=True) * off
        if node in results.values():
            values[node] = value
        return value

    observe(program, shaky | set(results.values()), [batch], look)
    return {name: values[node] for name, node in results.items()}
