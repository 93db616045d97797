"""What runs a language model: onnxruntime with its own cache, transformers for checkpoints, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitlower.frontends.task import is_decoder
from bitlower.ir import BitlowerError, Program
from bitlower.tools.evaluation.generation import generate
from bitlower.tools.evaluation.language_model import language_model, quantization_of

VOCABULARY = 24


@pytest.fixture(scope="module")
def table() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def save_counter(folder: Path, table: np.ndarray[Any, Any]) -> None:
    """An ONNX model whose cache holds the tokens: the next one hangs on the last token and the sum of all of them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "past + sequence"])
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 1, "past", 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])
    present = helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 1, "past + sequence", 1])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axes"], ["heads"]),
        helper.make_node("Concat", ["past_key_values.0.key", "heads"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", ["present.0.key", "last"], ["total"], keepdims=0),
        helper.make_node("Unsqueeze", ["total", "one"], ["column"]),
        helper.make_node("Mul", ["column", "direction"], ["shift"]),
        helper.make_node("Gather", ["table", "input_ids"], ["own"]),
        helper.make_node("Unsqueeze", ["shift", "one"], ["moved"]),
        helper.make_node("Add", ["own", "moved"], ["logits"]),
    ]
    constants = {
        "axes": np.array([1, 3]), "last": np.array([1, 2, 3]), "one": np.array([1]), "table": table,
        "direction": table[:1] / 8,
    }  # fmt: skip
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "counter", [ids, mask, past], [logits, present], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )


def test_onnxruntime_keeps_the_cache(tmp_path: Path, table: np.ndarray[Any, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    save_counter(tmp_path, table)
    prompt = torch.tensor([[3, 5, 7], [1, 2, 4]])
    expected = prompt.tolist()
    for row in expected:
        for _ in range(8):
            row.append(int((table[row[-1]] + sum(row) * table[0] / 8).argmax()))
    model = language_model(tmp_path)
    assert model.runtime == "onnxruntime"
    assert generate(model, prompt, 8).tolist() == expected
    _, cache = model.step({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, None)
    assert list(cache) == ["past_key_values.0.key"]
    assert cache["past_key_values.0.key"].numpy().shape == (2, 1, 3, 1)


def test_a_checkpoint_is_read_by_transformers(llama: Path, llama_program: Program, tmp_path: Path) -> None:
    """compressed-tensors with nothing compressed: the float model, through its reader."""
    pytest.importorskip("compressed_tensors")
    folder = shutil.copytree(llama, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    (folder / "config.json").write_text(json.dumps(config))
    assert quantization_of(folder) == "compressed-tensors"
    model = language_model(folder)
    assert model.runtime == "transformers"
    prompt = torch.tensor([[3, 5, 7]])
    assert torch.equal(generate(model, prompt, 6, stops=()), generate(llama_program, prompt, 6, stops=()))


def test_a_checkpoint_whose_reader_is_missing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("Loading a GPTQ quantized model requires gptqmodel\nmore")

    folder = shutil.copytree(llama, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(BitlowerError, match=r"requires gptqmodel; pip install gptqmodel"):
        language_model(folder)


def test_decoders_are_known_by_their_configuration(llama: Path, bert: Path, tmp_path: Path) -> None:
    assert is_decoder(llama)
    assert not is_decoder(bert)
    assert is_decoder(bert, "text-generation")
    assert not is_decoder(llama, "feature-extraction")
    assert not is_decoder(torch.nn.Linear(2, 2))
    with pytest.raises(BitlowerError):
        is_decoder(tmp_path / "nowhere")


def test_encoders_are_no_language_models(bert_program: Program) -> None:
    with pytest.raises(BitlowerError, match="no causal language model"):
        language_model(bert_program)
