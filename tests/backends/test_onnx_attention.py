"""Every form that torch's attention takes, in onnxruntime at each opset, against torch."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.frontends import load
from bitlower.ir import Program


class Forms(nn.Module):
    """Attention in many forms over the same queries and keys, each an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 4, 7, 8))
        self.table = nn.Parameter(torch.randn(1, 7))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = q * 2, q[..., :6]
        float_mask = torch.where(keep, 0.3, -torch.inf)[:, None, None, :]
        pairs = keep[:, None, :, None] | keep[:, None, None, :]
        return (
            attend(q, k[:, :1], v[:, :1]),
            attend(q, k[:, :2], v[:, :2], enable_gqa=True),
            attend(q, k, v, enable_gqa=True),
            attend(q, k[:, :2], v[:, :1], enable_gqa=True),
            attend(q[:, :1], k, v, is_causal=True),
            attend(q, self.memory, 2 * self.memory, attn_mask=self.table, scale=0.3),
            attend(x, 2 * x, x, attn_mask=keep[:, None, :]),
            attend(q[:, None], k[:, None], v[:, None], attn_mask=pairs[:, None]),
            attend(q, k, v, is_causal=True),
            attend(q, k, v, attn_mask=keep[:, None, None, :]),
            attend(q, k, v, attn_mask=keep[:, None, :, None]),
            attend(q, k[:, :1], v[:, :1], attn_mask=float_mask),
        )


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """The first row has keys to look at everywhere, the second half of them, the third none."""
    generator = torch.Generator().manual_seed(rows)
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[1:, length // 2 :] = False
    keep[2:] = False
    return {"x": torch.randn(rows, length, 32, generator=generator), "keep": keep}


@cache
def traced() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    module = Forms().eval()
    return module, load(module, example_inputs=batch(2, 10))


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_attention_is_exact_in_every_form(opset: int) -> None:
    module, program = traced()
    model, _ = lower(program, opset=opset, form="qdq")
    runtime = session(model)
    for rows, length in ((3, 9), (1, 4)):
        inputs = batch(rows, length)
        found = runtime.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = module.double()(inputs["x"].double(), inputs["keep"])
            module.float()
        for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6, err_msg=f"form {place}")


class Rotary(nn.Module):
    """Queries turned by tables that are shared over the batch, as models that count positions themselves make them."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[None, :, None] * self.frequencies
        table = torch.cat((angles, angles), -1)
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        turned = torch.cat((-q[..., 4:], q[..., :4]), -1)
        q = q * table.cos()[:, None] + turned * table.sin()[:, None]
        return attend(q, 0.5 * q, q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("opset", [22, 23])
def test_a_rotary_embedding_that_is_shared_over_the_batch_is_exact_for_any_batch(opset: int) -> None:
    module = Rotary().eval()
    model, _ = lower(load(module, example_inputs={"x": torch.randn(2, 10, 32)}), opset=opset, form="qdq")
    fused = [node.op_type for node in model.graph].count("RotaryEmbedding")
    assert fused == (1 if opset >= 23 else 0)
    runtime = session(model)
    for rows, length in ((1, 6), (3, 9)):
        x = torch.randn(rows, length, 32)
        np.testing.assert_allclose(runtime.run(None, {"x": x.numpy()})[0], module(x), rtol=1e-4, atol=2e-6)
