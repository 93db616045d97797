"""Runs on encoder-decoders from files of pairs: from the folder to the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlower
from bitlower import quantize
from bitlower.ir import BitlowerError
from bitlower.ir.generation import program_stages, write_targets
from bitlower.tools.cli import main
from bitlower.tools.planning.plan import plan_recipe
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.runs.flow import RunOptions, recipe_job, run_job

TEXT = "the a cat dog bird river sings runs sleeps falls near under old small quick and never"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Path:
    return seq2seq.save("bart", tmp_path_factory.mktemp("bart"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    words = TEXT.split()
    rows = [(" ".join(words[i : i + 6]), " ".join(words[i : i + 3])) for i in range(10)]
    path.write_text("source\ttarget\n" + "".join(f"{source}\t{target}\n" for source, target in rows))
    return path


def test_from_a_folder_to_an_artifact(folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    result = quantize(folder, scheme="W8A8", calibration=f"{data}:source,target", max_length=5, output=output)
    assert any("9 of 9 sources are longer than the model or max_length takes" in note for note in result.summary.notes)
    assert {"encoder_model.onnx", "decoder_model.onnx", "tokenizer.json"} <= {file.name for file in output.iterdir()}
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["rows"][-1]["outputs"]["logits"]["cosine"] > 0.98
    (batch,) = bitlower.frontends.batches(result.program, ["the cat"], pairs=["cat"])
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert bitlower.load(output).generate(**source, max_new_tokens=3).shape[1] <= 4


def test_without_targets_the_run_says_who_writes_them(folder: Path, data: Path, tmp_path: Path) -> None:
    result = quantize(folder, scheme="W8A8", calibration=f"{data}:source", samples=8)
    assert any("the float model writes those of the 8 sources itself" in note for note in result.summary.notes)


def test_weights_alone_need_no_data(folder: Path, tmp_path: Path) -> None:
    result = quantize(folder, scheme="W4A16-g16", algorithm="rtn", output=tmp_path / "artifact")
    assert result.output is not None


def test_a_recipe_names_both_columns(folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {folder}}}\n"
        "calibration: {data: pairs.tsv, column: [source, target], samples: 8}\n"
        "training: {data: pairs.tsv, column: [source, target], batch_size: 4}\n"
        "passes: [clean, {quantize: {scheme: W8A8}}, calibrate, {qat: {steps: 2}}, lower-integer]\n"
        "export: [onnx-qdq]\n"
    )
    job = recipe_job(load_recipe(recipe))
    program = job.load(None)
    found = job.read(program)
    assert {"input_ids", "decoder_input_ids"} <= set(found.calibration[0])
    assert {"input_ids", "decoder_input_ids"} <= set(found.training[0])
    recipe.write_text(recipe.read_text().replace("[source, target], samples", "[source], samples"))
    with pytest.raises(BitlowerError, match="write a column, or a list of two for pairs of texts"):
        load_recipe(recipe)


def test_a_column_that_is_missing_is_named_before_the_model_is_loaded(data: Path, folder: Path) -> None:
    with pytest.raises(BitlowerError, match="has no column 'summary'"):
        quantize(folder, scheme="W8A8", calibration=f"{data}:source,summary")


def test_a_recipe_ends_in_a_library(folder: Path, data: Path, tmp_path: Path, seq2seq: Any) -> None:
    """It is what the plan says, is verified, and writes what the Program does."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "artifact"
    recipe.write_text(
        f"model: {{path: {folder}}}\n"
        "calibration: {data: pairs.tsv, column: [source, target], samples: 8}\n"
        "passes: [clean, {quantize: {scheme: W8A8-token}}, calibrate, lower-integer, fuse]\n"
        "export: [tvm-kernels]\n"
    )
    planned = plan_recipe(load_recipe(recipe))
    program, summary = run_job(recipe_job(load_recipe(recipe)), output, RunOptions(cache=None))
    assert main(["verify", str(output)]) == 0
    assert 0.5 < summary.files["library.so"] / planned.file_bytes < 2  # mostly code, which is foretold roughly
    library = bitlower.load(output)
    read = seq2seq.source("bart", rows=3)
    options = {"start": torch.full((3, 1), 2), "stops": (), "max_new_tokens": 6, "no_repeat_ngram_size": 2}
    for beams in (1, 3):
        expected = write_targets(program, *program_stages(program), read, **options, num_beams=beams)
        assert torch.equal(library.generate(**read, **options, num_beams=beams), expected)
