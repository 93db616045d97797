"""Encoder-decoders as ONNX: two files, verified alone and together, that generate what the Program does."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import bitlower
from bitlower.backends.artifact.stages import part_batches, parts_of
from bitlower.backends.onnx_qdq import OnnxQdq, Verification
from bitlower.backends.onnx_qdq.model import OnnxEncoderDecoder
from bitlower.backends.onnx_qdq.verify import compare
from bitlower.backends.onnx_qdq.verify.compare import compare_export
from bitlower.backends.onnx_qdq.verify.record import Figures
from bitlower.backends.onnx_qdq.verify.stages import join_stages
from bitlower.ir import BitlowerError, CheckError, Program, set_tensor
from bitlower.ir.generation import program_stages, write_targets
from bitlower.ir.observe import run
from bitlower.passes import Context, PassManager, parse_pipeline

CASES = {
    "W8A8": "clean,quantize{scheme=W8A8},calibrate,lower-integer",
    "W8A8-full": "clean,quantize{scheme=W8A8-full},calibrate,lower-integer",
    "W4A16": "clean,quantize{scheme=W4A16-g16},gptq,lower-integer",
}


def lowered(seq2seq: Any, kind: str, pipeline: str) -> Program:
    data = seq2seq.batches(kind)
    return PassManager(parse_pipeline(pipeline)).run(seq2seq.traced(kind), Context(data, data[:1]))


@pytest.fixture(scope="module", params=["bart", "t5", "whisper"])
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seq2seq: Any
) -> tuple[str, Program, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    program = lowered(seq2seq, request.param, CASES["W8A8"])
    OnnxQdq().export(program, folder, seq2seq.batches(request.param, 2))
    return request.param, program, folder


def test_both_together_compute_what_the_program_does(artifact: tuple[str, Program, Path], seq2seq: Any) -> None:
    kind, program, folder = artifact
    model = bitlower.load(folder)
    assert isinstance(model, OnnxEncoderDecoder)
    (batch,) = seq2seq.batches(kind, 1, padded=False)
    expected = run(program, batch)
    del batch["decoder_attention_mask"]
    found = model(**batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=0.02 * float(value.std())), name


def test_every_product_of_codes_is_an_integer_kernel(artifact: tuple[str, Program, Path]) -> None:
    _, _, folder = artifact
    kernels = json.loads((folder / "verification.json").read_text())["kernels"]
    assert kernels["found"] == kernels["expected"] > 10
    assert set(kernels["floating"]) <= {"Attention"}


def test_what_both_read_lies_in_one_file(tmp_path: Path, seq2seq: Any) -> None:
    program = lowered(seq2seq, "bart", "clean")
    table = next(tensor for name, tensor in program.tensors() if name.endswith("shared.weight"))
    report = OnnxQdq().export(program, tmp_path, seq2seq.batches("bart", 1))
    assert report.files["shared.onnx.data"] == table.nbytes
    for stage in ("encoder", "decoder"):
        model = onnx.load(tmp_path / f"{stage}_model.onnx", load_external_data=False)
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places = [{e.key: e.value for e in tensor.external_data}["location"] for tensor in outside]
        assert places == ["shared.onnx.data"]
        assert np.array_equal(numpy_helper.to_array(outside[0], str(tmp_path)), table.detach().numpy())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "length_penalty": 2.0}], ids=["greedy", "beams"])
def test_it_generates_what_the_program_does(
    artifact: tuple[str, Program, Path], seq2seq: Any, settings: dict[str, Any]
) -> None:
    kind, program, folder = artifact
    model = bitlower.load(folder)
    read, start = seq2seq.source(kind, rows=3), torch.full((3, 1), 2)
    options = {"start": start, "stops": (), "max_new_tokens": 8, "no_repeat_ngram_size": 2, **settings}
    expected = write_targets(program, *program_stages(program), read, **options)
    assert torch.equal(model.generate(**read, **options), expected)


def test_an_artifact_of_a_float_model_generates_what_transformers_does(tmp_path: Path, seq2seq: Any) -> None:
    OnnxQdq().export(lowered(seq2seq, "t5", "clean"), tmp_path, seq2seq.batches("t5", 1))
    model, read = bitlower.load(tmp_path), seq2seq.source("t5", rows=4, seed=2)
    settings = {"max_new_tokens": 8, "num_beams": 4, "no_repeat_ngram_size": 1}
    expected = seq2seq.model_of("t5").generate(**read, do_sample=False, **settings)
    assert torch.equal(model.generate(**read, **settings), expected)
    with pytest.raises(BitlowerError, match="no source to write a target for") as caught:
        model.generate(input_id=read["input_ids"])
    assert caught.value.hint == "the encoder reads input_ids, attention_mask"
    with pytest.raises(BitlowerError, match="no setting 'beams'"):
        model.generate(**read, beams=3)


def test_what_targets_begin_and_end_with_is_the_models(artifact: tuple[str, Program, Path], seq2seq: Any) -> None:
    kind, _, folder = artifact
    model, read = bitlower.load(folder), seq2seq.source(kind)
    first = seq2seq.model_of(kind).config.decoder_start_token_id
    tokens = model.generate(**read, max_new_tokens=5)
    assert tokens[:, 0].tolist() == [first, first]


def test_the_artifact_is_checked_without_the_program(artifact: tuple[str, Program, Path], seq2seq: Any) -> None:
    kind, _, folder = artifact
    report = OnnxQdq.verify(folder)
    assert min(report.selftest.values()) > 0.9999
    assert set(report.selftest) == {spec.name for spec in seq2seq.traced(kind).outputs}
    assert report.unseen_sizes.startswith("batch 3, ")
    size = (folder / "verification.json").stat().st_size
    assert size < 200_000, "keys and values of cross-attention are computed, not written down"


@pytest.mark.parametrize("case", ["W8A8-full", "W4A16"])
def test_other_schemes(case: str, tmp_path: Path, seq2seq: Any) -> None:
    form = "onnxruntime" if case == "W4A16" else "qdq"
    report = OnnxQdq(form=form).export(lowered(seq2seq, "bart", CASES[case]), tmp_path, seq2seq.batches("bart", 2))
    assert report.verification.kernels.found == report.verification.kernels.expected
    assert {"decoder_model.onnx", "encoder_model.onnx"} <= set(report.files)


def test_a_missing_stage_is_named(artifact: tuple[str, Program, Path], tmp_path: Path) -> None:
    _, _, folder = artifact
    for file in folder.iterdir():
        if file.name != "decoder_model.onnx" and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckError, match=r"decoder_model\.onnx is missing"):
        OnnxQdq.verify(tmp_path)


def test_a_stage_alone_is_compared_without_a_self_test(
    artifact: tuple[str, Program, Path], seq2seq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of cross-attention as nested lists take many times the memory of the model."""

    def refuse(*_: Any) -> None:
        pytest.fail("nobody reads the self-test of a stage")

    monkeypatch.setattr(compare, "make_selftest", refuse)
    kind, program, folder = artifact
    parts = parts_of(program)
    batches = part_batches(parts, seq2seq.batches(kind, 1))
    for stage, part in parts.items():
        config = Verification.read(folder).session_config
        figures, selftest, unseen = compare_export(
            part, folder, batches[stage], file=f"{stage}_model.onnx", session_config=config
        )
        assert (selftest, unseen.selftest) == (None, None)
        assert figures.batches > 2
        assert unseen.sizes.startswith("batch 3")
    assert {row.name for row in figures.outputs} <= {row.name for row in Verification.read(folder).outputs}


def test_stages_that_are_another_program_together_are_seen(artifact: tuple[str, Program, Path], seq2seq: Any) -> None:
    kind, program, folder = artifact
    verification = Verification.read(folder)
    recorded = {"decoder": Figures(**{f.name: getattr(verification, f.name) for f in fields(Figures)})}
    join_stages(program, folder, recorded, seq2seq.batches(kind, 1)[0], {})
    other = program.clone()
    name, codes = next((n, t) for n, t in other.tensors() if n.endswith("_codes") and t.dim() == 2)
    set_tensor(other.module, name.partition("/")[2], -codes.clamp(min=-127))
    with pytest.raises(CheckError, match="the encoder and the decoder together return"):
        join_stages(other, folder, recorded, seq2seq.batches(kind, 1)[0], {})


def test_kernels_of_both_stages_are_timed(artifact: tuple[str, Program, Path]) -> None:
    _, _, folder = artifact
    times = OnnxQdq.kernel_times(folder)
    assert sum(time.calls for time in times if time.kernel == "MatMulIntegerToFloat") > 0
    assert [time.microseconds for time in times] == sorted((time.microseconds for time in times), reverse=True)
