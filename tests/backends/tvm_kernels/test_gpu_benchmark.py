"""The benchmark of a real GPU, as far as it runs without one: its measuring code on the CPU, and its refusal."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import Target, require_tvm

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with tiny blocks and few runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module, launches = importlib.import_module("gpu"), importlib.import_module("launches")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(launches.MODELS, "Llama-3.2-1B", ("Llama", small | {"vocab_size": 128}))
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "RUNS", 1)
    return module


def test_both_sides_are_timed(gpu: Any) -> None:
    """A step from a past: times are those of this processor."""
    row = gpu.row("Llama-3.2-1B", "W8A8", gpu.SIZES["step"], Target.LLVM, "cpu", torch.float32)
    assert (row["launches"], row["tokens"], row["past"]) == (11, 1, 128)
    assert all(isinstance(row[key], float) for key in ("us", "torch_us", "x_torch"))


def test_without_a_gpu_one_message_says_so(gpu: Any) -> None:
    if require_tvm().cuda().exist:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match=r"times an NVIDIA GPU: .* finds none here"):
        gpu.require_gpu()
