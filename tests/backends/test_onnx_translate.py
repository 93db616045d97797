"""Translations of single operators, in onnxruntime against torch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from bitlower.backends.onnx_qdq._lower import lower
from bitlower.frontends import load


class Differences(nn.Module):
    """A number minus a tensor, in all ways that a model may write it."""

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return 1.0 - mask, 1 - mask, torch.rsub(mask, 1.5, alpha=3), 2 - x, torch.rsub(x, 0.5, alpha=-2)


@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
def test_a_number_minus_a_tensor_of_any_type_keeps_value_and_type(form: str) -> None:
    inputs = {"mask": torch.tensor([[1, 0, 7], [0, 1, 1]]), "x": torch.randn(2, 3)}
    model, _ = lower(load(Differences(), example_inputs=inputs), opset=21, form=form)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(found, Differences()(**inputs), strict=True):
        assert ours.dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours, theirs.numpy())
