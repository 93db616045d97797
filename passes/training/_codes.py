"""How the codes of weights change while a model is trained."""

from __future__ import annotations

import torch
from torch import nn

from bitlower.ir.learnable import LearnableQuantizer
from bitlower.ir.quantization import numerics
from bitlower.ir.trainable import TrainableModule
from bitlower.passes.training._report import QuantizerRow


class CodeChanges:
    """Remembers codes and scales of a module at its start and late in the training.

    Args:
        module: before it is trained.
    """

    def __init__(self, module: TrainableModule) -> None:
        self._module = module
        self._first = _codes(module)
        self._scales = {name: q.qparams(module.weight_of(name))[0] for name, q in module.quantizers().items()}
        self.late: dict[str, torch.Tensor] = {}
        """The codes of each quantizer's weight, int16, at the time of :meth:`note`."""

    def note(self) -> None:
        """Remember the codes as they are now."""
        self.late = _codes(self._module)

    def rows(self) -> tuple[QuantizerRow, ...]:
        """What became of each quantizer until now."""
        now = _codes(self._module)
        return tuple(self._row(name, quantizer, now.get(name)) for name, quantizer in self._module.quantizers().items())

    def _row(self, name: str, quantizer: LearnableQuantizer, codes: torch.Tensor | None) -> QuantizerRow:
        weight = self._module.weight_of(name)
        scale, zero = quantizer.qparams(weight)
        drift = float((scale / self._scales[name] - 1).abs().max())
        tensor = self._module.weights.get(name, name.rpartition(".")[2])
        if codes is None or weight is None:
            return QuantizerRow(name, tensor, drift, quantizer.dead())
        low, high = quantizer.clipping.ends(scale, zero)
        outside = numerics.blockwise(weight.detach(), low, high, lambda w, a, b: ((w < a) | (w > b)).float())
        late = self.late.get(name, codes)
        return QuantizerRow(
            name, tensor, drift, quantizer.dead(), _share(codes, self._first[name]), _share(codes, late),
            float(outside.mean()),
        )  # fmt: skip


def _share(codes: torch.Tensor, before: torch.Tensor) -> float:
    """Of the codes, those that are others."""
    return int((codes != before).sum()) / codes.numel()


def _codes(module: TrainableModule) -> dict[str, torch.Tensor]:
    """The codes of all quantized weights, int16."""
    codes = {}
    for name, quantizer in module.quantizers().items():
        weight = module.weight_of(name)
        if isinstance(weight, nn.Parameter):
            scale, zero = quantizer.qparams(weight)
            ends = quantizer.clipping.quant_min, quantizer.clipping.quant_max
            codes[name] = numerics.codes(weight.detach(), scale, zero, *ends).to(torch.int16)
    return codes
