"""The teacher: the float model that a Program was quantized from, run once a batch and kept on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import fx

from bitlower.ir import Batch, BitlowerError, Program, ops
from bitlower.ir.folding import without_quantizers
from bitlower.ir.operators import graph_results, set_graph_results
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.storage import release, spill
from bitlower.ir.tensors import copy_module
from bitlower.passes._machinery.base import Context
from bitlower.passes._machinery.loss import Values
from bitlower.passes.training._devices import move
from bitlower.passes.training._forward import Forward, Taps

Told = tuple[Values, torch.Tensor | None]
Key = tuple[str, int]
"""The part of the data that a batch is of, and its place in it."""


def float_reference(program: Program, context: Context) -> Program:
    """The float model that ``program`` is to be like: the one it was quantized from, or itself without rounding.

    Raises:
        BitlowerError: the former is unknown, and weights are rounded already.
    """
    if context.reference is not None:
        return context.reference
    for node in program.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        view = QuantizerNode(node)
        if view.rounds_parameter and _is_rounded(program, view):
            raise BitlowerError(
                f"the float model is not known any more, and {view.parameter} is rounded already",
                hint="run `quantize`, what rounds, and what trains in one pipeline",
            )
    return without_quantizers(program)[0]


def _is_rounded(program: Program, view: QuantizerNode) -> bool:
    """Whether the weight under a quantizer that has its range lies on the grid, and is not all zeros."""
    if not view.is_calibrated:
        return False
    weight, grid = view.weight(program.module), view.spec.grid
    same = numerics.fake(weight, *view.range(program.module), grid.quant_min, grid.quant_max).equal(weight)
    rounded = same and bool(weight.any())
    release(weight)
    return rounded


class Teacher:
    """What the float model says about each batch.

    Args:
        reference: the float model.
        needs: of the losses.
        logits: whether they look at logits.
        device: where it runs.
        budget: bytes of answers that are kept on disk; later batches are run again each time.
        folder: for them.
    """

    def __init__(
        self,
        reference: Program,
        needs: frozenset[str],
        *,
        logits: bool,
        device: torch.device,
        budget: int,
        folder: Path | None,
    ) -> None:
        taps = Taps.of(reference, needs)
        self.forward = Forward(reference, _tapped(reference, taps, device), taps, logits=logits)
        self._left, self._folder = budget, folder
        self._told: dict[Key, Told] = {}
        self.weights: tuple[torch.Tensor, ...] = ()
        if self.forward.head:
            with torch.no_grad():
                self.weights = self.forward.head.weights()

    def __call__(self, key: Key, batch: Batch) -> Told:
        """The values that losses look at, and the rows that its head reads; ``key`` names the batch."""
        if key not in self._told:
            with torch.no_grad():
                told = self.forward(batch)
            size = sum(tensor.nbytes for tensor in tensors_of(told))
            if size > self._left:
                return told
            self._left -= size
            self._told[key] = _spilled(told, self._folder)
        values, rows = self._told[key]
        device = next(iter(batch.values())).device
        if device.type == "cpu":
            return values, rows
        hidden, attention = (tuple(t.to(device) for t in part) for part in (values.hidden, values.attention))
        return Values(hidden, attention), rows.to(device) if rows is not None else None


def _tapped(program: Program, taps: Taps, device: torch.device) -> fx.GraphModule:
    """The graph of ``program`` on a device, with the values of ``taps`` after its outputs."""
    module = copy_module(program.module)
    if device.type != "cpu":
        module = copy.deepcopy(module)
        move(module, device)
    named = {node.name: node for node in module.graph.nodes}
    set_graph_results(module.graph, [*graph_results(module.graph), *(named[name] for name in taps.names)])
    return module


def tensors_of(told: Told) -> list[torch.Tensor]:
    """All values of an answer."""
    values, rows = told
    return [*values.hidden, *values.attention, *([rows] if rows is not None else [])]


def _spilled(told: Told, folder: Path | None) -> Told:
    values, rows = told
    hidden, attention = (
        tuple(spill(t.cpu(), folder=folder) for t in part) for part in (values.hidden, values.attention)
    )
    return Values(hidden, attention), spill(rows.cpu(), folder=folder) if rows is not None else None
