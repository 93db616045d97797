"""A decoder in one line to ONNX and to a checkpoint: sizes as planned, the Program's numbers in each client."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bitlower.frontends import load
from bitlower.frontends.tokenize import token_ids
from bitlower.tools.evaluation.generation import generate
from bitlower.tools.evaluation.language_model import language_model
from bitlower.tools.evaluation.perplexity import perplexity
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import make_plan
from bitlower.tools.runs.flow import Quantized, quantize
from bitlower.tools.runs.standard import standard_exports, standard_passes

SCHEME, FORMATS = "W4A16-g32", ("onnx-qdq", "checkpoint")


@pytest.fixture(scope="module")
def model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that the graph, whose size is estimated roughly, is not most of the file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("wide") / "llama"))
    config = LlamaConfig(
        vocab_size=600, hidden_size=192, intermediate_size=768, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Both artifacts."""
    pytest.importorskip("compressed_tensors")
    output = tmp_path_factory.mktemp("artifacts") / "out"
    return quantize(
        model, scheme=SCHEME, calibration=[text()], output=output, formats=FORMATS, samples=4, max_length=32
    )


def text() -> str:
    """300 words of the tokenizer."""
    words = ["the", "a", "cat", "dog", "bird", "house", "tree", "river", "sings", "runs", "near", "red", "old"]
    return " ".join(words[(7 * i * i + 3 * i) % len(words)] for i in range(300))


def test_every_client_computes_what_the_program_does(made: Quantized) -> None:
    assert made.output is not None
    ids = token_ids(made.program, text())
    expected = perplexity(made.program, ids, window=32, windows=4).perplexity
    tokens = generate(made.program, ids[None, :8], 12)
    for name, runtime, tolerance in (("onnx-qdq", "onnxruntime", 1e-4), ("checkpoint", "transformers", 2e-3)):
        client = language_model(made.output / name)
        assert client.runtime == runtime
        assert client.program.context_length == 64
        assert perplexity(client, ids, window=32, windows=4).perplexity == pytest.approx(expected, rel=tolerance)
        assert torch.equal(generate(client, ids[None, :8], 12), tokens)


def test_sizes_are_as_planned(made: Quantized, model: Path) -> None:
    exports, sizes = standard_exports(SCHEME, FORMATS), made.summary.files
    plans = [make_plan(load(str(model)), standard_passes(SCHEME), Load(4, 32), [export]) for export in exports]
    assert plans[0].file_bytes == pytest.approx(sizes["onnx-qdq/model.onnx"], rel=0.02)
    assert plans[1].file_bytes == pytest.approx(sizes["checkpoint/model.safetensors"], rel=0.02)
    both = make_plan(load(str(model)), standard_passes(SCHEME), Load(4, 32), exports)
    assert both.artifact_bytes == sum(plan.artifact_bytes for plan in plans)
    assert both.artifact_bytes == pytest.approx(made.summary.artifact_bytes, rel=0.04)
