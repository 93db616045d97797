"""Encoder-decoders in the layout of optimum and transformers.js, read as these clients do, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import bitlower
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.backends.onnx_qdq.write.optimum import misreadings
from bitlower.ir import CheckError, Program, ops
from bitlower.ir.generation import program_stages, write_targets
from bitlower.passes import Context, PassManager, parse_pipeline

NEW, W8A8 = 8, "clean,quantize{scheme=W8A8},calibrate,lower-integer"


def lowered(seq2seq: Any, kind: str, pipeline: str) -> Program:
    data = seq2seq.batches(kind)
    return PassManager(parse_pipeline(pipeline)).run(seq2seq.traced(kind), Context(data, data[:1]))


def export(seq2seq: Any, kind: str, pipeline: str, folder: Path, **options: Any) -> tuple[Program, Any]:
    program = lowered(seq2seq, kind, pipeline)
    return program, OnnxQdq(layout="optimum", **options).export(program, folder, seq2seq.batches(kind, 2))


class Client:
    """What ORTModelForSeq2SeqLM and transformers.js do: empty caches of the sizes in the file, and one decoder."""

    def __init__(self, folder: Path) -> None:
        names = "encoder_model.onnx", "decoder_model_merged.onnx"
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in names
        )
        self.known = {value.name: value.shape for value in self.decoder.get_inputs()}

    def greedy(self, source: dict[str, torch.Tensor], start: int, *, cached: bool) -> torch.Tensor:
        """``NEW`` tokens, with the past of each step, or all tokens anew."""
        given = {name: value.numpy() for name, value in source.items()}
        (hidden,) = self.encoder.run(["last_hidden_state"], given)
        rows, cache = len(hidden), None
        tokens = np.full((rows, 1), start)
        for _ in range(NEW):
            feed = {"input_ids": tokens if cache is None else tokens[:, -1:], "encoder_hidden_states": hidden}
            if "encoder_attention_mask" in self.known:
                feed["encoder_attention_mask"] = given["attention_mask"]
            feed |= cache or {
                name: np.zeros([rows if dim == "batch_size" else 0 if isinstance(dim, str) else dim for dim in shape])
                .astype(np.float32)
                for name, shape in self.known.items()
                if name.startswith("past_key_values")
            }  # fmt: skip
            outputs = [value.name for value in self.decoder.get_outputs()]
            values = dict(zip(outputs, self.decoder.run(None, feed), strict=True))
            if cached:
                cache = {n.replace("present", "past_key_values"): v for n, v in values.items() if n != "logits"}
            tokens = followed(torch.from_numpy(tokens), torch.from_numpy(values["logits"])).numpy()
        return torch.from_numpy(tokens)


def followed(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``tokens`` and the most likely one that none of them is."""
    return torch.cat([tokens, logits[:, -1].scatter(1, tokens, -torch.inf).argmax(-1, keepdim=True)], dim=1)


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_clients_write_what_transformers_does_with_a_past_and_without(kind: str, tmp_path: Path, seq2seq: Any) -> None:
    export(seq2seq, kind, "clean", tmp_path)
    model, read, client = seq2seq.model_of(kind), seq2seq.source(kind, rows=3, seed=3), Client(tmp_path)
    start = model.config.decoder_start_token_id
    expected = torch.full((3, 1), start)
    with torch.no_grad():
        for _ in range(NEW):
            expected = followed(expected, model(**read, decoder_input_ids=expected).logits)
    for cached in (True, False):
        assert client.greedy(read, start, cached=cached).equal(expected)


def test_names_are_those_that_clients_look_for_in_their_order(tmp_path: Path, seq2seq: Any) -> None:
    export(seq2seq, "bart", "clean", tmp_path)
    client, model = Client(tmp_path), seq2seq.model_of("bart")
    sides = ("decoder", "encoder")
    pairs = [f"{layer}.{side}.{part}" for layer in (0, 1) for side in sides for part in ("key", "value")]
    assert [*client.known] == [
        "input_ids", "encoder_attention_mask", "encoder_hidden_states", *(f"past_key_values.{name}" for name in pairs)
    ]  # fmt: skip
    assert [value.name for value in client.decoder.get_outputs()] == ["logits", *(f"present.{name}" for name in pairs)]
    assert all(shape[0] == "batch_size" for shape in client.known.values())
    assert [value.name for value in client.encoder.get_outputs()] == ["last_hidden_state"]
    read = seq2seq.source("bart", seed=5)
    (hidden,) = client.encoder.run(None, {name: value.numpy() for name, value in read.items()})
    with torch.no_grad():
        expected = model.get_encoder()(**read).last_hidden_state
    seen = read["attention_mask"].bool()
    assert torch.allclose(torch.from_numpy(hidden)[seen], expected[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pipeline", "form"),
    [
        ("bart", W8A8, "qdq"),
        ("whisper", "clean,quantize{scheme=W8A8-token},calibrate,lower-integer", "onnxruntime"),
        pytest.param("t5", W8A8.replace("W8A8", "W8A8-full"), "qdq", marks=pytest.mark.nightly),
        pytest.param("t5", "clean,quantize{scheme=W4A16-g16},rtn,lower-integer", "qdq", marks=pytest.mark.nightly),
    ],
)
def test_few_bits_are_the_programs(kind: str, pipeline: str, form: str, tmp_path: Path, seq2seq: Any) -> None:
    program, report = export(seq2seq, kind, pipeline, tmp_path, form=form)
    kernels = report.verification.kernels
    assert (kernels.found, sum(kernels.low_bit_weights.values())) == (kernels.expected, kernels.expected_low_bit)
    assert kernels.expected + kernels.expected_low_bit > 20
    assert "genai_config.json" not in report.files
    quantized = program.graph.find_nodes(op="call_function", target=ops.quantize)
    assert {row.name for row in report.verification.quantized} == {node.name for node in quantized}
    model = bitlower.load(tmp_path)
    read, start = seq2seq.source(kind, rows=3), torch.full((3, 1), 2)
    for beams in (1, 3):
        settings = {"start": start, "stops": (), "max_new_tokens": NEW, "num_beams": beams, "no_repeat_ngram_size": 2}
        expected = write_targets(program, *program_stages(program), read, **settings)
        assert torch.equal(model.generate(**read, **settings), expected)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Path:
    folder = tmp_path_factory.mktemp("bart")
    export(seq2seq, "bart", W8A8, folder, external_data_threshold=0)
    return folder


def test_tensors_lie_where_clients_look_for_them(artifact: Path) -> None:
    data = sorted(path.name for path in artifact.iterdir() if "onnx" in path.name)
    assert data == [f"{name}.onnx{end}" for name in ("decoder_model_merged", "encoder_model") for end in ("", "_data")]


def test_it_is_checked_and_called_without_the_program(artifact: Path, tmp_path: Path, seq2seq: Any) -> None:
    report = OnnxQdq.verify(artifact)
    assert min(report.selftest.values()) > 0.9999
    assert set(report.selftest) == {spec.name for spec in seq2seq.traced("bart").outputs}
    (batch,) = seq2seq.batches("bart", 1, padded=False)
    del batch["decoder_attention_mask"]
    model = bitlower.load(artifact)
    assert {spec.name for spec in model.inputs} == {
        *batch, *(s.name for s in seq2seq.traced("bart").inputs if ".decoder." in s.name)
    }  # fmt: skip
    assert set(model(**batch)) == set(report.selftest)
    for file in artifact.iterdir():
        if file.name != "decoder_model_merged.onnx" and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckError, match=r"decoder_model_merged\.onnx is missing"):
        OnnxQdq.verify(tmp_path)


def test_a_card_says_how_clients_load_it(artifact: Path) -> None:
    assert "ORTModelForSeq2SeqLM.from_pretrained(folder)" in (artifact / "README.md").read_text()
    assert json.loads((artifact / "manifest.json").read_text())["backend_options"]["layout"] == "optimum"


def test_a_cache_of_other_sizes_than_optimum_makes_is_named(seq2seq: Any) -> None:
    program = seq2seq.traced("t5").clone()
    assert [*misreadings(program)] == []
    program.config["d_model"] = 48
    (note,) = misreadings(program)
    assert "2 heads of 24, this model's has 2 of 8" in note
