"""Lower a simulated Program to integers: weights become codes, activations pass through quantize → dequantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bitlower.ir import BitlowerError, Level, Program, TensorType, ops, set_tensor
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.by_rows import by_rows
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.ir.storage import like, release
from bitlower.passes._machinery.base import Context, Contract, Pass


@dataclass(frozen=True)
class LowerInteger(Pass):
    """Replace every fake-quantize node by integer codes and their dequantization; the numbers stay bit for bit."""

    name: ClassVar[str] = "lower-integer"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    ensures: ClassVar[Level | None] = Level.INTEGER
    contract: ClassVar[Contract] = Contract.EXACT
    keeps_sizes: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> bool:
        """Lower all quantizers.

        Raises:
            BitlowerError: a quantizer has no range yet.
        """
        nodes = program.graph.find_nodes(op="call_function", target=ops.fake_quantize)
        for node in nodes:
            lower(program.module, node)
        return bool(nodes)


def lower(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace one fake-quantize node."""
    view = QuantizerNode(node)
    if is_uncalibrated(node):
        raise BitlowerError(f"the quantizer of {view.quantizer.tensor} has no range", hint="run `calibrate` first")
    with node.graph.inserting_before(node):
        code = _weight_codes(module, view) if view.rounds_parameter else _activation_codes(view)
        real = node.graph.call_function(ops.dequantize, (code, view.scale, view.zero_point))
    real.meta = dict(node.meta)
    node.replace_all_uses_with(real)
    node.graph.erase_node(node)


def _weight_codes(module: fx.GraphModule, view: QuantizerNode) -> fx.Node:
    grid, weight = view.spec.grid, view.weight(module)

    def rounded(v: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return numerics.codes(v, s, z, grid.quant_min, grid.quant_max).to(grid.dtype)

    codes = like(by_rows(weight, *view.range(module), rounded, grid.dtype), weight)
    release(weight)
    target = f"{view.parameter}_codes"
    set_tensor(module, target, codes)
    attribute = view.node.graph.get_attr(target)
    attribute.meta = {"type": TensorType(codes.dtype, tuple(codes.shape))}
    return attribute


def _activation_codes(view: QuantizerNode) -> fx.Node:
    grid, node = view.spec.grid, view.node
    dtype = str(grid.dtype).removeprefix("torch.")
    args = (view.value, view.scale, view.zero_point, grid.quant_min, grid.quant_max, dtype)
    code = node.graph.call_function(ops.quantize, args)
    code.meta = dict(node.meta) | {"type": node.meta["type"].with_dtype(grid.dtype)}
    return code
