"""A rehearsal runs all of a recipe on a part of the model, and finds what the run would find."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.passes import known_passes
from bitlower.tools.cli import main
from bitlower.tools.data.batches import Data
from bitlower.tools.recipes.recipe import Recipe
from bitlower.tools.runs.job import RunOptions
from bitlower.tools.runs.rehearsal import few, layer_count, rehearse, with_layers

OPTIONS = RunOptions(cache=None)


@pytest.fixture(scope="session")
def deep(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of eight equal layers."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "deep"
    config = LlamaConfig.from_pretrained(llama)
    config.num_hidden_layers = 8
    config.layer_types = None
    torch.manual_seed(1)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def recipe_of(model: Path, story: Path, *passes: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(model)},
            "calibration": {"data": str(story), "samples": 6, "max_length": 12},
            "passes": ["clean", *passes, "lower-integer"],
            "export": [{"onnx-qdq": {"form": "onnxruntime"}}],
        }
    )


def test_few_layers_are_the_first_of_the_model(deep: Path) -> None:
    short, whole = load(deep, few_layers=True), load(deep)
    assert (layer_count(short), layer_count(whole)) == (3, 8)
    assert short.notes[-1] == "3 of 8 layers"
    tensors = dict(whole.tensors())
    for name, tensor in short.tensors():
        if tensor.dtype is torch.float32 and "layers" in name:
            assert torch.equal(tensor, tensors[name]), name


def test_the_whole_recipe_runs_and_nothing_is_left(deep: Path, story: Path, tmp_path: Path) -> None:
    recipe = recipe_of(deep, story, {"quantize": {"scheme": "W4A16-g16"}}, "gptq")
    before = sorted(tmp_path.rglob("*"))
    rehearsal = rehearse(recipe, OPTIONS)
    assert rehearsal.layers == "3 of 8 layers"
    assert {"model.onnx", "verification.json", "verdict.json"} <= set(rehearsal.files)
    assert {"gptq", "onnx-qdq"} <= set(rehearsal.stages)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pass_that_fails_in_the_end_fails_in_the_rehearsal(deep: Path, story: Path) -> None:
    recipe = recipe_of(deep, story, {"quantize": {"scheme": "W4A16-g16", "ignore": ["model.layer.*"]}}, "rtn")
    with pytest.raises(BitlowerError, match=r"model\.layer"):
        rehearse(recipe, OPTIONS)


def test_patterns_that_name_later_layers_name_the_last_of_the_few(deep: Path, story: Path) -> None:
    ignored = ["model.layers.7.mlp", "model.layers.0.mlp.up_proj", r"re:.*layers\.6\.self_attn\..*"]
    recipe = recipe_of(deep, story, {"quantize": {"scheme": "W4A16-g16", "ignore": ignored}}, "rtn")
    (_, step, *_) = with_layers(recipe, 3).passes
    assert step.params["ignore"] == [
        "model.layers.2.mlp", "model.layers.0.mlp.up_proj", r"re:.*layers\.2\.self_attn\..*",
    ]  # fmt: skip
    assert step.params["scheme"] == "W4A16-g16"
    assert with_layers(recipe, None) is recipe
    assert rehearse(recipe, OPTIONS).layers == "3 of 8 layers"


def test_a_model_without_equal_layers_is_rehearsed_whole(bert: Path, texts: Path) -> None:
    form = recipe_of(bert, texts, {"quantize": {"scheme": "W8A8"}}, "calibrate").model_dump(exclude_unset=True)
    rehearsal = rehearse(Recipe.model_validate(form | {"export": ["onnx-qdq"]}), OPTIONS)
    assert rehearsal.layers == "the whole model"


def test_few_data_are_the_first_rows_and_tokens(llama_program: Program) -> None:
    ids = torch.arange(3 * 6 * 50).reshape(3, 6, 50) % 30
    mask = torch.ones_like(ids[0])
    batches = [{"input_ids": rows, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1} for rows in ids]
    labelled = [{**batch, "labels": torch.arange(6)} for batch in batches]
    small = few(llama_program, Data(batches, batches, training=labelled))
    for part in (small.calibration, small.evaluation, small.training):
        assert len(part) == 2
        assert torch.equal(part[1]["input_ids"], ids[1, :4, :32])
        assert part[1]["attention_mask"].shape == (4, 32)
    assert small.training[0]["labels"].tolist() == [0, 1, 2, 3]
    assert list(small.held_out) == []


@pytest.mark.parametrize("name", ["qat", "lkd", "autoround", "adaround"])
def test_passes_that_iterate_do_so_twice(name: str) -> None:
    short = known_passes()[name]().rehearsed()
    assert 2 in (getattr(short, "steps", None), getattr(short, "iterations", None))
    assert known_passes()["gptq"]().rehearsed() == known_passes()["gptq"]()


def test_the_command(
    deep: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: SimpleNamespace
) -> None:
    arguments = ["quantize", str(deep), "--scheme", "W4A16-g16", "-o", str(tmp_path / "out"), "--rehearse"]
    assert main([*arguments, "--no-cache", "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert (form["rehearsed"], form["layers"]) == (True, "3 of 8 layers")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main([*arguments, "--no-cache"]) == 2
    assert "exists already" in capsys.readouterr().err
