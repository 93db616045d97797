"""From a recipe or one line to a library of kernels, and what can be done with its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import bitlower
from bitlower.backends import registry
from bitlower.backends.tvm_kernels import Library, pins
from bitlower.frontends import load
from bitlower.frontends.tokenize import token_ids
from bitlower.ir import BitlowerError, Level, Program
from bitlower.tools.cli import main
from bitlower.tools.evaluation.generation import generate
from bitlower.tools.evaluation.perplexity import perplexity
from bitlower.tools.evaluation.runners import open_runner
from bitlower.tools.planning.plan import plan_model
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.runs.flow import RunOptions, quantize, run_recipe
from bitlower.tools.runs.standard import standard_passes

RECIPE = """\
model: {path: MODEL}
calibration: {data: sentences.txt, samples: 16, max_length: 16}
passes:
  - clean
  - quantize: {scheme: W8A8}
  - calibrate
  - lower-integer
  - fuse
export:
  - tvm-kernels: {target: host}
"""


@pytest.fixture
def recipe(bert: Path, texts: Path) -> Path:
    """A recipe beside its texts."""
    path = texts.with_name("recipe.yaml")
    path.write_text(RECIPE.replace("MODEL", str(bert)))
    return path


@pytest.fixture(scope="module")
def decoder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """The tiny decoder with 4-bit weights: the Program, and the folder of its library."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    folder = tmp_path_factory.mktemp("library") / "llama"
    made = quantize(llama, scheme="W4A16-g16-asym", output=folder, formats=["tvm-kernels"])
    assert made.program.level is Level.FUSED
    return made.program, folder


def test_a_recipe_ends_in_a_library(recipe: Path, bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    summary = run_recipe(load_recipe(recipe), tmp_path / "out", RunOptions(cache=None))
    assert summary.reports["tvm-kernels"]["operators"]["compiled"]["fused_norm"] == 4
    figures = summary.reports["tvm-kernels"]["verification"]["summary"]
    assert figures["kernel_error"] < 1e-4
    found, expected = (
        sum(summary.reports["tvm-kernels"]["verification"]["calls"][side].values()) for side in ("found", "expected")
    )
    assert found == expected > 0
    assert f"{found} of {expected} calls of low-bit kernels" in summary.verdicts["tvm-kernels"].line
    library = bitlower.load(tmp_path / "out")
    assert isinstance(library, Library)
    checked = registry.verify_artifact(tmp_path / "out")
    assert checked["selftest"]["last_hidden_state"] > 0.999
    assert checked["headline"]["kernel_calls"] == [found, expected]
    runner = open_runner(tmp_path / "out")
    texts = bitlower.batches(runner.program, ["the cat sings", "a dog"])
    assert load_recipe(tmp_path / "out" / "recipe.yaml").passes == load_recipe(recipe).passes
    given = library(**texts[0])
    for name, value in runner.run(texts[0]).items():
        assert np.array_equal(value, given[name].numpy())


def test_a_library_generates_what_its_program_does(decoder: tuple[Program, Path]) -> None:
    program, folder = decoder
    library = bitlower.load(folder)
    prompts = torch.stack([token_ids(program, "the cat sings and"), token_ids(program, "a dog sleeps under")])
    for settings in ({}, {"num_beams": 3}):
        expected = generate(program, prompts, 12, stops=(), **settings)
        assert torch.equal(generate(library, prompts, 12, stops=(), **settings), expected)
        assert torch.equal(library.generate(prompts, max_new_tokens=12, stops=(), **settings), expected)
    ids = torch.arange(3, 36)
    ours, theirs = (perplexity(model, ids, window=16).perplexity for model in (program, library))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_command_line_takes_its_folder(
    decoder: tuple[Program, Path], story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(decoder[1])
    assert main(["verify", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["selftest"]["logits"] > 0.999999
    call = ["eval", folder, "--task", "text-generation", "--data", str(story), "--window", "16"]
    assert main([*call, "--prompt", "the cat", "--new-tokens", "3", "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert form["runtime"] == "TVM"
    assert form["samples"][0]["new_tokens"] <= 3
    assert form["perplexity"] > 1


def test_a_damaged_library_is_refused(decoder: tuple[Program, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(decoder[1], tmp_path / "copy"))
    (folder / "library.so").write_bytes((folder / "library.so").read_bytes()[:-1])
    assert main(["verify", str(folder)]) == 1
    (folder / "library.so").unlink()
    assert main(["eval", str(folder), "--task", "text-generation", "--prompt", "the cat"]) == 2


def test_the_plan_foretells_the_size(decoder: tuple[Program, Path], llama: Path) -> None:
    plan = plan_model(str(llama), "W4A16-g16-asym", formats=["tvm-kernels"])
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    # Panels of 64 outputs; a scale of 4 bytes and a zero point of 1 for each group of 16 inputs.
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert (down.shape, down.bytes) == ((32, 64), 64 * 64 // 2 + 64 * 4 * 5)
    assert tensors["lm_head.weight"].bits == 32
    stored = (decoder[1] / "library.so").stat().st_size
    assert 0.5 < stored / plan.file_bytes < 2  # mostly code, which is foretold roughly


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  - fuse\n", "", r"backend 'tvm-kernels': .* this is integer; end the passes with `fuse`"),
        ("target: host", "target: lvm", "'target' takes one of host, llvm, .* not \"lvm\"; did you mean 'llvm'"),
        ("target: host", "opset: 23", r"backend 'tvm-kernels' has no option 'opset'"),
        (
            "tvm-kernels: {target: host}",
            "onnx-qdq",
            r"backend does not know; leave out the pass `fuse`",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_the_model_is_read(
    recipe: Path, old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlower.tools.runs.flow.load", lambda *_, **__: pytest.fail("the model was read"))
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(BitlowerError, match=message):
        run_recipe(load_recipe(recipe), tmp_path / "out", RunOptions(cache=None))


def test_without_tvm_one_line_says_so_before_the_model_is_read(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitlower.tools.runs.flow.load", lambda *_, **__: pytest.fail("the model was read"))
    monkeypatch.setattr(pins, "PINS", {"no-such-package": "1"})
    assert main(["run", str(recipe), "-o", str(tmp_path / "out"), "--no-cache"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: low-bit kernels need no-such-package, which is not installed; pip install 'bitlower[tvm]'"
    assert not (tmp_path / "out").exists()


def test_pipelines_for_libraries_end_with_fuse() -> None:
    names = [pass_.name for pass_ in standard_passes("W8A8", formats=["tvm-kernels"])]
    assert names == ["clean", "quantize", "calibrate", "lower-integer", "fuse"]
    names = [pass_.name for pass_ in standard_passes("W4A16-g128", formats=["tvm-kernels"])]
    assert names == ["clean", "quantize", "gptq", "lower-integer", "fuse"]
    with pytest.raises(BitlowerError, match=r"no program fits both; run once for each"):
        standard_passes("W8A8", formats=["onnx-qdq", "tvm-kernels"])


def test_an_operator_without_converter_is_refused_before_calibration(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    from bitlower.passes.quantizers.calibrate import Calibrate

    def odd(*arguments: object, **options: object) -> Program:
        program = load(*arguments, **options)  # type: ignore[arg-type]
        node = next(node for node in program.graph.nodes if node.target is torch.ops.aten.tanh.default)
        node.target = torch.ops.aten.erfinv.default
        program.recompile()
        return program

    monkeypatch.setattr("bitlower.tools.runs.flow.load", odd)
    monkeypatch.setattr(Calibrate, "run", lambda *_: pytest.fail("it calibrates"))
    with pytest.raises(BitlowerError, match=r"%tanh in pooler\S*: there is no converter for aten\.erfinv"):
        run_recipe(load_recipe(recipe), tmp_path / "out", RunOptions(cache=None))
