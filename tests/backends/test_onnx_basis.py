"""Programs whose channels stand in another order or basis, in onnxruntime: the export compares with the Program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitlower.backends.onnx_qdq import export
from bitlower.ir import Program
from bitlower.passes import Context, PassManager, parse_pipeline


@pytest.mark.parametrize("first", ["rotate", "peg-permute{scope=layer}"])
def test_what_was_reordered_or_rotated_is_exported(
    first: str, family: Callable[[str], Program], feed: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    program = family("gpt2")
    batches = [feed(program, seed=seed) for seed in range(2)]
    passes = parse_pipeline(f"{first},quantize{{scheme=W8A8-upeg3}},calibrate,legalize,lower-integer")
    made = PassManager(passes).run(program, Context(batches))
    assert export(made, tmp_path, batches=batches).verification.outputs
