"""Quantizers in a graph: their operands, whether they are calibrated, and how a range is written into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.operators import argument, operand
from bitlower.ir.program_data import ProgramData
from bitlower.ir.quantization.scheme import QuantSpec
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import get_tensor, set_tensor


@dataclass(frozen=True)
class QuantizerNode:
    """A ``fake_quantize``, ``quantize`` or ``dequantize`` node."""

    node: fx.Node

    @property
    def value(self) -> fx.Node:
        """What it rounds, or the codes that it dequantizes."""
        return operand(self.node, "code" if self.node.target is ops.dequantize else "x")

    @property
    def scale(self) -> fx.Node:
        """The scale: a stored tensor, or one of the results of ``choose_qparams``."""
        return operand(self.node, "scale")

    @property
    def zero_point(self) -> fx.Node:
        """The zero point, where the scale is."""
        return operand(self.node, "zero_point")

    @property
    def quantizer(self) -> Quantizer:
        """What it stands for."""
        node_quantizer: Quantizer = self.node.meta["quantizer"]
        return node_quantizer

    @property
    def spec(self) -> QuantSpec:
        """Its grid and granularity."""
        return self.quantizer.spec

    @property
    def is_static(self) -> bool:
        """Whether its scale is stored, and not computed from the values at run time."""
        return self.scale.op == "get_attr"

    @property
    def rounds_parameter(self) -> bool:
        """Whether its value is a stored tensor."""
        return self.value.op == "get_attr"

    @property
    def parameter(self) -> str:
        """The name of the stored tensor that it rounds."""
        return str(self.value.target)

    @property
    def stored(self) -> tuple[str, str]:
        """The names of the stored scale and zero point."""
        return str(self.scale.target), str(self.zero_point.target)

    def weight(self, module: fx.GraphModule) -> torch.Tensor:
        """The stored tensor that it rounds, detached."""
        return get_tensor(module, self.parameter).detach()

    def range(self, module: fx.GraphModule) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored scale and zero point, detached."""
        scale, zero_point = (get_tensor(module, name).detach() for name in self.stored)
        return scale, zero_point

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a range: one that is computed at run time, or that :meth:`set_range` gave it."""
        return self.node.target is not ops.fake_quantize or bool(argument(self.node, "calibrated"))

    def set_range(self, module: fx.GraphModule, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Write a scale and a zero point, each in the shape of the granularity; it is calibrated from then on.

        ``module`` must be compiled again before it is called, as the pass manager does after each pass.
        """
        for name, tensor in zip(self.stored, (scale, zero_point), strict=True):
            set_tensor(module, name, tensor)
        self.node.kwargs = {name: value for name, value in self.node.kwargs.items() if name != "calibrated"}


def is_uncalibrated(node: fx.Node) -> bool:
    """Whether ``node`` is a quantizer that has no range yet."""
    return node.target is ops.fake_quantize and not QuantizerNode(node).is_calibrated


def set_range(module: fx.GraphModule, node: fx.Node, low: torch.Tensor, high: torch.Tensor) -> None:
    """Give ``node`` the scale and zero point of a range; ``low`` and ``high`` have the shape of its scale."""
    view = QuantizerNode(node)
    scale, zero_point = view.spec.grid.qparams(low, high)
    view.set_range(module, scale.contiguous(), zero_point.contiguous())


def require_calibrated(program: ProgramData) -> None:
    """See that every quantizer has a range.

    Raises:
        BitlowerError: one has none; it is named.
    """
    for node, quantizer in program.quantizers():
        if is_uncalibrated(node):
            raise BitlowerError(f"the quantizer of {quantizer.tensor} has no range", hint="run `calibrate` first")
