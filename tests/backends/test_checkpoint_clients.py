"""transformers with compressed-tensors loads what is exported, and computes what the Program does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.backends.checkpoint import export, verify
from bitlower.ir import Program, get_tensor, ops, set_tensor

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

Lowered = Callable[..., Program]


def load_client(folder: Path, **arguments: Any) -> torch.nn.Module:
    """The model as its users load it, all of whose weights are in the files and all of the files' are in it."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


def rounded(program: Program, dtype: torch.dtype) -> Program:
    """The Program with its scales and float weights rounded as they are in the files."""
    copy = program.clone()
    scales = {str(node.args[1].target) for node, _ in copy.quantizers() if node.target is ops.dequantize}
    for name, tensor in program.tensors():
        target = name.removeprefix("model/")
        if target in scales or isinstance(tensor, torch.nn.Parameter):
            set_tensor(copy.module, target, get_tensor(program.module, target).detach().to(dtype).float())
    return copy


CASES = [("llama", "W4A16-g32", ""), ("llama", "W2A16-g16", ""), ("llama-tied", "W3A16", ""),
    ("llama", "W8A16-g32-e4", "model.embed_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scheme", "ignore"), CASES)
def test_logits_are_the_programs(lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str, ignore: str):
    program = lowered(kind, scheme, ignore)
    export(program, tmp_path, batches=prompts)
    model = load_client(tmp_path, dtype=torch.float32)
    expected = rounded(program, torch.float16)
    for batch in prompts:
        ours = expected(**batch)["logits"].detach()
        torch.testing.assert_close(logits_of(model, batch), ours, rtol=0, atol=1e-5 * float(ours.std()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (kind == "llama-tied")


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "W4A16-g32-asym"), ("llama-tied", "W3A16-asym")])
def test_zero_points_are_loaded(lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str):
    program = lowered(kind, scheme)
    export(program, tmp_path, batches=prompts, dtype="float32")
    model = load_client(tmp_path)
    for batch in prompts:
        ours = program(**batch)["logits"].detach()
        torch.testing.assert_close(logits_of(model, batch), ours, rtol=0, atol=1e-5 * float(ours.std()))


def test_weights_can_be_dequantized_while_they_load(lowered: Lowered, prompts, tmp_path: Path):
    from transformers import CompressedTensorsConfig

    program = lowered("llama-tied", "W4A16-g32")
    export(program, tmp_path, batches=prompts)
    config = CompressedTensorsConfig(dequantize=True)
    model = load_client(tmp_path, dtype=torch.float32, quantization_config=config)
    ours = program(**prompts[0])["logits"].detach()
    assert float((logits_of(model, prompts[0]) - ours).abs().max()) < 0.02 * float(ours.std())


def test_half_precision_is_as_near_as_it_can_be(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    export(program, tmp_path, batches=prompts)
    model = load_client(tmp_path)
    assert model.dtype == torch.float16
    ours = program(**prompts[0])["logits"].detach()
    assert float((logits_of(model, prompts[0]) - ours).abs().max()) < 0.02 * float(ours.std())


def test_a_quantized_head_of_a_tied_model_is_untied(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama-tied", "W4A16-g32-e8", "model.embed_tokens")
    export(program, tmp_path, batches=prompts, dtype="float32")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    model = load_client(tmp_path)
    ours = program(**prompts[0])["logits"].detach()
    torch.testing.assert_close(logits_of(model, prompts[0]), ours, rtol=0, atol=1e-5 * float(ours.std()))


def test_shards_are_found(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    report = export(program, tmp_path, batches=prompts, dtype="float32", max_shard_size=30_000)
    shards = sorted(path for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.packed_bytes + report.float_bytes
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    ours = program(**prompts[0])["logits"].detach()
    logits = logits_of(load_client(tmp_path), prompts[0])
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * float(ours.std()))
    assert verify(tmp_path).layers == 14
