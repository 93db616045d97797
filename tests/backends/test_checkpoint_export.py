"""Checkpoints are read back by code that shares nothing with the backend: numpy, and the libraries that load them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bitlower.backends.checkpoint import export, verify
from bitlower.frontends import load
from bitlower.ir import Program, get_tensor
from bitlower.ir.quantization import numerics
from bitlower.passes import Context, PassManager, parse_pipeline

Lowered = Callable[..., Program]
Array = np.ndarray[Any, Any]


def stream(words: Array, bits: int, count: int) -> Array:
    """The first ``count`` codes of each row of 32-bit words, bit by bit, least significant first."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)
    flags = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    return (flags.reshape(len(words), count, bits) * (1 << np.arange(bits))).sum(-1)


def read_compressed(tensors: dict[str, Array], path: str, arguments: dict[str, Any]) -> Array:
    """A weight of the pack-quantized format, float64: ``scale · (code − zero point)``."""
    rows, columns = tensors[f"{path}.weight_shape"]
    bits, scales = arguments["num_bits"], tensors[f"{path}.weight_scale"].astype(np.float64)
    codes = stream(tensors[f"{path}.weight_packed"], bits, columns)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if not arguments["symmetric"]:
        zeros = stream(tensors[f"{path}.weight_zero_point"].T, bits, rows).T
    size = arguments["group_size"] or columns
    return (codes - np.repeat(zeros, size, 1)) * np.repeat(scales, size, 1)


def read_gptq(tensors: dict[str, Array], path: str, bits: int) -> Array:
    """A weight [out, in] of version 2 of the GPTQ format, float64: ``scales[g] · (code − zero[g])``."""
    qweight, scales = tensors[f"{path}.qweight"], tensors[f"{path}.scales"].astype(np.float64)
    assert scales.shape == (len(tensors[f"{path}.qzeros"]), qweight.shape[1])
    codes = stream(qweight.T, bits, qweight.shape[0] * 32 // bits).T
    zeros = stream(tensors[f"{path}.qzeros"], bits, qweight.shape[1])
    group = tensors[f"{path}.g_idx"]
    return (scales[group] * (codes - zeros[group])).T


def stored_weights(program: Program, dtype: torch.dtype = torch.float16) -> dict[str, Array]:
    """By module path what each quantized weight of the Program is with its scales rounded to ``dtype``."""
    weights = {}
    for node, quantizer in program.quantizers():
        codes, scale, zero = (get_tensor(program.module, str(part.target)) for part in node.args)
        value = numerics.values(codes, scale.to(dtype).float(), zero)
        weights[quantizer.tensor.removesuffix(".weight")] = value.numpy()
    return weights


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W3A16-g32-asym", "W2A16-g16-asym", "W8A16", "W8A16-tensor"])
def test_compressed_tensors_hold_the_program(lowered: Lowered, prompts, tmp_path: Path, scheme: str):
    program = lowered("llama", scheme)
    report = export(program, tmp_path, batches=prompts)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    arguments = config["config_groups"]["group_0"]["weights"]
    weights = stored_weights(program)
    assert len(weights) == report.packed == 14
    for path, weight in weights.items():
        np.testing.assert_allclose(read_compressed(tensors, path, arguments), weight, rtol=1e-6, atol=1e-9)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    assert verify(tmp_path).codes == sum(weight.size for weight in weights.values())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("llama", "W4A16-g32-asym"), ("llama-tied", "W3A16-g32"), ("gpt2", "W8A16-asym"), ("gpt2", "W2A16-g16-asym")],
)
def test_gptq_holds_the_program(lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str):
    program = lowered(kind, scheme)
    report = export(program, tmp_path, batches=prompts, format="gptq-v2")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    weights = stored_weights(program)
    for path, weight in weights.items():
        np.testing.assert_allclose(read_gptq(tensors, path, config["bits"]), weight, rtol=1e-6, atol=1e-9)
    assert (config["quant_method"], config["checkpoint_format"], config["desc_act"]) == ("gptq", "gptq_v2", False)
    assert config["sym"] is ("asym" not in scheme)
    assert (config["lm_head"], config["dynamic"]) == (False, None)
    assert verify(tmp_path).layers == report.packed == len(weights)


def test_what_stays_float_has_the_models_own_name_and_orientation(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("gpt2", "W4A16-g32", "re:.*c_proj")
    export(program, tmp_path, batches=prompts, format="gptq-v2", dtype="bfloat16")
    from safetensors.torch import load_file as load_torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tensors = load_torch(tmp_path / "model.safetensors")
    model = GPT2LMHeadModel(GPT2Config(**{**program.config, "quantization_config": None}))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    packed = {f"{name.removesuffix('.qweight')}.weight" for name in tensors if name.endswith(".qweight")}
    plain = {name for name in tensors if name.rpartition(".")[2] in ("weight", "bias")}
    assert plain == set(expected) - packed
    for name in plain:
        assert (tensors[name].shape, tensors[name].dtype) == (expected[name], torch.bfloat16)
    matrix = get_tensor(program.module, "transformer.h.1.mlp.c_proj.weight").detach()
    assert torch.equal(tensors["transformer.h.1.mlp.c_proj.weight"], matrix.T.bfloat16())
    config = json.loads((tmp_path / "config.json").read_text())
    left = [f"-:^transformer\\.h\\.{i}\\.{part}\\.c_proj$" for i in (0, 1) for part in ("attn", "mlp")]
    assert list(config["quantization_config"]["dynamic"]) == left
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["GPT2LMHeadModel"])


def test_gptq_names_layers_that_differ_from_the_most(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32-e8", "model.embed_tokens")
    export(program, tmp_path, batches=prompts, format="gptq-v2")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["lm_head"]) == (4, 32, True)
    assert config["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True}}
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_allclose(read_gptq(tensors, "lm_head", 8), stored_weights(program)["lm_head"], rtol=1e-6)
    assert verify(tmp_path).layers == 15


TABLES = [
    ("llama-tied", "W4A16-g32-e8", "compressed-tensors", {"model.embed_tokens": "no client ties"}),
    ("llama-tied", "W4A16-g32-e8", "gptq-v2", {"model.embed_tokens": "no client ties"}),
    ("llama", "W4A16-g32-e8", "compressed-tensors", {"model.embed_tokens": "no embedding tables"}),
    ("llama", "W4A16-g32-e8", "gptq-v2", {"model.embed_tokens": "no embedding tables"}),
    ("llama", "W4A16-g32-asym-e8", "compressed-tensors",
     {"model.embed_tokens": "no embedding tables", "lm_head": "packed in one way"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scheme", "form", "expected"), TABLES)
def test_tables_that_a_format_cannot_hold_are_written_as_the_floats_that_they_stand_for(
    lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str, form: Any, expected: dict[str, str]
):
    program = lowered(kind, scheme)
    report = export(program, tmp_path, batches=prompts, format=form, dtype="float32")
    assert set(report.float_tables) == {f"{path}.weight" for path in expected}
    assert all(expected[name.removesuffix(".weight")] in reason for name, reason in report.float_tables.items())
    values, tensors = stored_weights(program, torch.float32), load_file(tmp_path / "model.safetensors")
    for path in expected:
        np.testing.assert_array_equal(tensors[f"{path}.weight"], values[path])
    assert report.packed == 14 + (kind == "llama" and len(expected) == 1)
    verify(tmp_path)


def test_the_folder_has_what_clients_ask_for(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama-tied", "W4A16-g32")
    program.assets = {"tokenizer.json": b"{}"}
    report = export(program, tmp_path, batches=prompts, provenance={"seed": 7})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "manifest.json",
        "verification.json", "README.md",
    }  # fmt: skip
    assert set(report.files) == names - {"manifest.json", "verification.json"}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["backend"], manifest["provenance"]) == ("checkpoint", {"seed": 7})
    assert manifest["backend_options"]["format"] == "compressed-tensors"
    assert report.packed_bytes + report.float_bytes < (tmp_path / "model.safetensors").stat().st_size


def test_how_the_model_generates_stays_its_own(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama-tied", "W4A16-g32")
    program.assets = {"generation_config.json": b'{"temperature": 0.6, "eos_token_id": [2, 7]}'}
    export(program, tmp_path, batches=prompts)
    assert (tmp_path / "generation_config.json").read_bytes() == program.assets["generation_config.json"]


def test_ties_stay_and_are_written_once(lowered: Lowered, prompts, tmp_path: Path):
    export(lowered("llama-tied", "W4A16-g32"), tmp_path, batches=prompts)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" in names
    assert not any(name.startswith("lm_head") for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_equal_programs_give_equal_bytes(lowered: Lowered, prompts, tmp_path: Path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        export(lowered("llama", "W3A16-g32-asym"), folder, batches=prompts)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert not any(str(tmp_path).encode() in data for data in first.values())


def test_verification_says_what_half_precision_costs(lowered: Lowered, prompts, tmp_path: Path):
    reports = {}
    for dtype in ("float32", "float16", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        reports[dtype] = export(lowered("llama", "W4A16-g32"), folder, batches=prompts, dtype=dtype).verification
    for dtype, verification in reports.items():
        (logits,) = verification.outputs
        assert (logits.name, verification.batches, verification.tokens) == ("logits", 3, 36 + 3 * 7)
        assert logits.given_weights < 1e-5, dtype
    exact, half, brain = (reports[dtype] for dtype in ("float32", "float16", "bfloat16"))
    assert (exact.outputs[0].worst, exact.float_error, exact.layers[0].scale_error) == (0, 0, 0)
    assert 0 < half.layers[0].scale_error < 2**-10
    assert half.layers[0].scale_error < brain.layers[0].scale_error < 2**-7
    assert 0 < half.outputs[0].relative < brain.outputs[0].relative < 0.2
    json.dumps(half.to_dict())


def test_a_float_program_becomes_a_plain_folder(lowered: Lowered, prompts, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    program = lowered("gpt2")
    export(program, tmp_path, batches=prompts, dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**prompts[0]).logits
    torch.testing.assert_close(logits, program(**prompts[0])["logits"].detach(), rtol=1e-4, atol=1e-4)
    assert verify(tmp_path).layers == 0


def test_a_kernel_has_the_shape_of_the_model(prompts, tmp_path: Path):
    """The model's dense layers are convolutions of size 1, which are linear layers in the Program."""
    from transformers import SqueezeBertConfig, SqueezeBertForSequenceClassification

    groups = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
    config = SqueezeBertConfig(
        vocab_size=96, hidden_size=64, embedding_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=8, **groups,
    )  # fmt: skip
    model = SqueezeBertForSequenceClassification(config).eval()
    query, key = (f"transformer.encoder.layers.0.attention.{part}" for part in ("query", "key"))
    passes = f"clean,quantize{{scheme=W4A16-g32 ignore=[{query}]}},calibrate{{weights=minmax}},lower-integer"
    program = PassManager(parse_pipeline(passes)).run(load(model), Context())
    batches = [
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
        for batch in prompts
    ]
    report = export(program, tmp_path, batches=batches, dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors[f"{query}.weight"], model.get_parameter(f"{query}.weight").detach().numpy())
    rounded = stored_weights(program, torch.float32)[key]
    np.testing.assert_allclose(tensors[f"{key}.weight"], rounded[..., None], rtol=1e-6, atol=1e-9)
    assert "kernel of a convolution" in report.float_tables[f"{key}.weight"]
    assert report.packed == 2
