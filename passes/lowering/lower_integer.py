"""Lower a simulated Program to integers: weights become codes, activations pass through quantize → dequantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bitlower.ir import BitlowerError, Level, Program, Quantizer, TensorType, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import operand
from bitlower.ir.quantization import numerics
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
    value, scale, zero = (operand(node, position) for position in range(3))
    quantizer: Quantizer = node.meta["quantizer"]
    if scale.op == "get_attr" and not bool(get_tensor(module, str(scale.target)).any()):
        raise BitlowerError(f"the quantizer of {quantizer.tensor} has no range", hint="run `calibrate` first")
    with node.graph.inserting_before(node):
        code = _weight_codes(module, node) if value.op == "get_attr" else _activation_codes(node, quantizer)
        real = node.graph.call_function(ops.dequantize, (code, scale, zero))
    real.meta = dict(node.meta)
    node.replace_all_uses_with(real)
    node.graph.erase_node(node)


def _weight_codes(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    value, scale, zero = (operand(node, position) for position in range(3))
    grid = node.meta["quantizer"].spec.grid
    weight = get_tensor(module, str(value.target)).detach()
    scales, zeros = (get_tensor(module, str(part.target)) for part in (scale, zero))
    codes = like(numerics.codes(weight, scales, zeros, grid.quant_min, grid.quant_max).to(grid.dtype), weight)
    release(weight)
    target = f"{value.target}_codes"
    set_tensor(module, target, codes)
    attribute = node.graph.get_attr(target)
    attribute.meta = {"type": TensorType(codes.dtype, tuple(codes.shape))}
    return attribute


def _activation_codes(node: fx.Node, quantizer: Quantizer) -> fx.Node:
    grid = quantizer.spec.grid
    dtype = str(grid.dtype).removeprefix("torch.")
    code = node.graph.call_function(ops.quantize, (*node.args, dtype))
    code.meta = dict(node.meta) | {"type": node.meta["type"].with_dtype(grid.dtype)}
    return code
