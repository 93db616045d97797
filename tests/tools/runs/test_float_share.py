from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.tools.runs.float_share import float_parts


class Mixed(nn.Module):
    """A table of 40 · 8, a convolution of 8 · 8 · 3, a linear layer of 8 · 4 and vectors of 8 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        return self.head(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


@pytest.mark.parametrize("passes", ["clean,quantize{scheme=W8A8-token}", "calibrate,lower-integer"])
def test_what_stays_float_is_named_with_its_share(passes: str) -> None:
    if "quantize" not in passes:
        passes = f"clean,quantize{{scheme=W8A8-token}},{passes}"
    batches = [{"input_ids": torch.randint(0, 40, (2, 6))}]
    program = load(Mixed().eval(), example_inputs=batches[0])
    total = 320 + 192 + 32 + 8 + 4
    before = {part.kind: part.share * total for part in float_parts(program)}
    assert before["linear layers"] == pytest.approx(32)
    result = PassManager(parse_pipeline(passes)).run(program, Context(calibration=batches))
    parts = {part.kind: (round(part.share * total), part.tensors) for part in float_parts(result)}
    assert parts.pop("embedding tables", (320, ("table.weight",))) == (320, ("table.weight",))
    assert parts == {
        "convolutions": (192, ("conv.weight",)),
        "vectors and others": (12, ("norm.weight", "head.bias")),
    }
    found = next(part for part in float_parts(result) if part.kind == "convolutions")
    assert str(found) == f"convolutions {192 / total:.1%} (conv.weight)"
