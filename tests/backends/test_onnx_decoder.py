from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import pytest
import torch
import transformers

import bitlower
from bitlower.backends.decoding import cached_steps, visible
from bitlower.backends.onnx_qdq import ExportReport, export, verify
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.runtime.session import Session
from bitlower.frontends import load
from bitlower.ir import BitlowerError, CheckError, Program, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

VOCABULARY, LENGTH, NEW = 100, 96, 64
TOKENS: dict[str, int] = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 97}
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **TOKENS}
LINEARS = {"llama": 14, "gpt2": 8, "opt": 12}
WEIGHT_ONLY = "W4A16-g16"


def _model(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    match kind:
        case "llama":
            config = transformers.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, **COMMON,
            )  # fmt: skip
        case "gpt2":
            config = transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, vocab_size=VOCABULARY, **TOKENS
            )
        case _:
            config = transformers.OPTConfig(
                hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **COMMON
            )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            parameter.data.mul_(4.0)  # so that attention is not uniform and the next token is no constant
    return model


@cache
def decoder(kind: str, scheme: str = "float") -> Program:
    """Two layers of width 32; grouped-query attention and rotary positions in the Llama."""
    if scheme == "float":
        return PassManager([Clean()]).run(load(_model(kind), task="text-generation"), Context())
    passes = [Quantize(scheme=Scheme.parse(scheme)), Calibrate(weights="minmax"), LowerInteger()]
    return PassManager(passes).run(decoder(kind), Context(calibration=[batch(2, 8)]))


def batch(rows: int, length: int, seed: int = 0, padded: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if rows > 1:
        mask[-1, slice(length // 2 + 1, None) if padded == "right" else slice(0, length // 2)] = 0
    return {
        "input_ids": torch.randint(0, VOCABULARY - 3, (rows, length), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


BATCHES = [batch(3, 9, 1), batch(2, 7, 2, "left")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``exported(kind, scheme, **options)``: the folder and the report, written once."""

    @cache
    def give(kind: str, scheme: str = "float", **options: Any) -> tuple[Path, ExportReport]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, export(decoder(kind, scheme), folder, batches=BATCHES, **options)

    return give


@pytest.mark.parametrize("kind", LINEARS)
def test_a_loaded_artifact_generates_what_transformers_does(kind: str, exported: Any) -> None:
    given = batch(3, 9, 5, "left")
    prompts = {name: given[name] for name in ("input_ids", "attention_mask")}
    model, loaded = _model(kind), bitlower.load(exported(kind)[0])
    for settings in ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}):
        expected = model.generate(**prompts, max_new_tokens=12, do_sample=False, **settings)
        assert torch.equal(loaded.generate(**prompts, max_new_tokens=12, **settings), expected), settings
    with pytest.raises(BitlowerError, match="padded on the right"):
        loaded.generate(**{name: value.flip(1) for name, value in prompts.items()})


def greedy(run: Any, program: Program, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``NEW`` tokens, each the likeliest; one call for the prompt, one for each token."""
    given = {"input_ids": prompt, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    names = [spec.name for spec in program.inputs]
    caches: dict[str, torch.Tensor] = {}
    tokens = []
    for _ in range(NEW):
        results = run(program.complete({name: given[name] for name in names if name in given} | caches))
        token = results["logits"][:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        caches = {n.replace("present", "past_key_values"): v for n, v in results.items() if n.startswith("present")}
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        given = {"input_ids": token, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    return torch.cat(tokens, 1)


def run_program(program: Program) -> Any:
    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return program(**inputs)

    return run


def run_session(path: Path) -> Any:
    session = Session(path, config={"session.qdq_matmulnbits_accuracy_level": "1"})
    return lambda inputs: {name: torch.from_numpy(value) for name, value in session.run(inputs).items()}


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize(("scheme", "form"), [("float", "qdq"), (WEIGHT_ONLY, "onnxruntime")])
def test_64_tokens_are_those_of_the_program(kind: str, scheme: str, form: str, exported: Any) -> None:
    folder, _ = exported(kind, scheme, form=form)
    program = decoder(kind, scheme)
    prompt = batch(2, 6, 5, "left")
    expected = greedy(run_program(program), program, prompt["input_ids"], prompt["attention_mask"])
    found = greedy(run_session(folder / "model.onnx"), program, prompt["input_ids"], prompt["attention_mask"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(expected.unique()) > 5


@pytest.mark.parametrize("kind", LINEARS)
def test_the_cache_is_the_attention_operators_own(kind: str, exported: Any) -> None:
    folder, report = exported(kind, WEIGHT_ONLY, form="onnxruntime")
    model = onnx.load(folder / "model.onnx")
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert [len(node.input) for node in attention] == [6, 6]
    assert {name for node in attention for name in node.output[1:]} == {
        f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    }
    heads = {attribute.name: attribute.i for attribute in attention[0].attribute}
    assert (heads["q_num_heads"], heads["kv_num_heads"]) == (4, 2 if kind == "llama" else 4)
    used = Counter(node.op_type for node in model.graph.node)
    assert used["Transpose"] == 0
    assert used["MatMulNBits"] == LINEARS[kind]
    assert used["RotaryEmbedding"] == (4 if kind == "llama" else 0)
    assert report.rules["keep-cache"] == {"applied": 2, "refused": {}}


def test_inputs_and_outputs_bear_the_programs_names_and_dimensions(exported: Any) -> None:
    folder, _ = exported("llama", WEIGHT_ONLY, form="onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert list(shapes)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert shapes["attention_mask"] == ["batch", "past + sequence"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past", 8]
    assert shapes["present.1.value"] == ["batch", 2, "past + sequence", 8]
    assert shapes["logits"] == ["batch", "sequence", VOCABULARY]


def test_a_tied_table_is_stored_once(exported: Any) -> None:
    folder, _ = exported("gpt2", WEIGHT_ONLY, form="onnxruntime")
    model = onnx.load(folder / "model.onnx")
    large = [t.name for t in model.graph.initializer if sorted(t.dims) == [32, VOCABULARY]]
    assert len(large) == 1
    readers = sorted(node.op_type for node in model.graph.node if large[0] in node.input)
    assert readers == ["FusedMatMul", "Gather"]


def test_below_opset_23_attention_is_written_out(tmp_path: Path) -> None:
    report = export(decoder("llama"), tmp_path, batches=BATCHES, opset=21)
    assert "Attention" not in report.operators
    assert report.verification.summary()["output_relative_error"] < 1e-5


def test_verification_decodes_and_leaves_out_padding(exported: Any) -> None:
    folder, report = exported("llama", WEIGHT_ONLY, form="onnxruntime")
    assert report.verification.batches == 6  # a part, that in two steps, both batches, and one of other sizes
    assert {row.name for row in report.verification.outputs} == {
        "logits", *(f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value"))
    }  # fmt: skip
    assert all(row.given_codes < 1e-5 for row in report.verification.outputs)
    assert verify(folder).selftest["logits"] > 1 - 1e-6


def test_steps_have_the_past_of_those_before() -> None:
    program = decoder("llama")
    whole = batch(2, 9)
    with torch.no_grad():
        expected = program(**whole)["logits"]
        steps = [(step, program(**step)["logits"]) for step in cached_steps(program, whole)]
    assert [step["input_ids"].shape[1] for step, _ in steps] == [3, 1]
    assert [step["past_key_values.1.key"].shape[2] for step, _ in steps] == [5, 8]
    for (step, logits), columns in zip(steps, (slice(5, 8), slice(8, 9)), strict=True):
        assert step["attention_mask"].shape[1] == columns.stop
        torch.testing.assert_close(logits[0], expected[0, columns])
    assert not list(cached_steps(program, batch(1, 1)))


def test_padding_is_not_visible() -> None:
    program = decoder("llama")
    shown = visible(program, program.complete(batch(2, 6, padded="left")))
    assert shown["logits"].tolist() == [[[True]] * 6, [[False]] * 3 + [[True]] * 3]
    assert shown["present.0.key"].shape == (2, 1, 6, 1)
    assert visible(program, program.complete(batch(1, 6))) == {}


def test_a_cache_that_is_not_appended_to_is_found(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported("llama", WEIGHT_ONLY, form="onnxruntime")
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == "past_key_values.1.key":
                node.input[position] = "past_key_values.1.value"
    onnx.save(model, tmp_path / "model.onnx")
    from bitlower.backends.onnx_qdq import verify_export

    with pytest.raises(CheckError, match="is not its program"):
        verify_export(decoder("llama", WEIGHT_ONLY), tmp_path, BATCHES)


def test_weights_are_neither_folded_nor_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are inputs while constants are folded, and read the Program's own storage afterwards."""
    program, seen = decoder("opt"), []
    real = onnxscript.optimizer.fold_constants

    def spy(model: Any) -> Any:
        seen.extend(value.const_value.size for value in model.graph.initializers.values())
        return real(model)

    monkeypatch.setattr(onnxscript.optimizer, "fold_constants", spy)
    model, _ = lower(program, opset=23, form="onnxruntime")
    assert seen
    assert max(seen) <= 256
    table = model.graph.initializers["model.decoder.embed_tokens.weight"].const_value
    parameter = program.module.get_parameter("model.decoder.embed_tokens.weight")
    assert table.numpy().ctypes.data == parameter.data_ptr()


def test_the_description_for_onnxruntime_genai(exported: Any) -> None:
    folder, report = exported("llama", WEIGHT_ONLY, form="qdq")
    config = json.loads((folder / "genai_config.json").read_text())
    model, inner = config["model"], config["model"]["decoder"]
    assert {key: model[key] for key in TOKENS} == TOKENS
    assert (model["context_length"], model["vocab_size"], model["type"]) == (LENGTH, VOCABULARY, "decoder")
    assert (inner["head_size"], inner["hidden_size"], inner["num_hidden_layers"]) == (8, 32, 2)
    assert (inner["num_attention_heads"], inner["num_key_value_heads"]) == (4, 2)
    assert inner["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "1"
    assert "genai_config.json" in report.files


@pytest.mark.parametrize("kind", LINEARS)
def test_onnxruntime_genai_generates_what_the_program_does(kind: str, exported: Any) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder, _ = exported(kind, WEIGHT_ONLY, form="onnxruntime")
    program, prompt = decoder(kind, WEIGHT_ONLY), torch.tensor([[5, 17, 60, 3]])
    expected = greedy(run_program(program), program, prompt, torch.ones_like(prompt))[0].tolist()
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=prompt.shape[1] + NEW, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    found = np.array(generator.get_sequence(0)).tolist()[prompt.shape[1] :]
    stop = expected.index(99) if 99 in expected else NEW
    assert found[:stop] == expected[:stop]
    assert stop > 2


def test_an_encoder_is_not_described_for_generation(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    program = load(transformers.BertModel(config))
    ids = torch.ones(2, 5, dtype=torch.int64)
    export(program, tmp_path, batches=[dict.fromkeys((spec.name for spec in program.inputs), ids)])
    assert not (tmp_path / "genai_config.json").exists()


def test_a_file_of_the_model_cannot_stand_in_for_ours(tmp_path: Path) -> None:
    program = decoder("gpt2").clone()
    program.assets["genai_config.json"] = b"{}"
    with pytest.raises(BitlowerError, match="cannot lie in an artifact"):
        export(program, tmp_path, batches=BATCHES)
