"""Bad input through the command line: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitlower.tools.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: SimpleNamespace) -> Refused:
    """``refused(arguments…)`` runs the command, holds it to the rules for bad input, and gives its line."""

    def run(*arguments: object, mistakes: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert sorted(tmp_path.rglob("*")) == before
        assert out == ""
        notes, mark, lines = err.rpartition("error: ")
        assert mark, err
        assert notes == "" or notes.endswith("\n")
        assert "error: " not in notes
        assert "Traceback" not in err
        assert len(lines.splitlines()) == mistakes, err
        return lines

    return run


@pytest.fixture
def quantize(refused: Refused, tmp_path: Path, bert: Path, texts: Path) -> Refused:
    """``quantize(…)``: the one-line command with a good model, texts and output, if nothing else is given."""

    def run(*more: object, model: object = bert, calibration: object = texts, output: object = tmp_path / "out") -> str:
        return refused("quantize", model, "--calibration", calibration, "-o", output, *more)

    return run


@pytest.fixture
def recipe(refused: Refused, tmp_path: Path, bert: Path, texts: Path) -> Refused:
    """``recipe(old, new)``: run a good recipe in which ``old`` is replaced by ``new``."""
    good = f"""\
model: {{path: {bert}}}
calibration: {{data: {texts}, samples: 32}}
passes:
  - clean
  - quantize: {{scheme: W8A8}}
  - calibrate
  - lower-integer
export:
  - onnx-qdq
"""

    def run(old: str, new: str, *more: object, mistakes: int = 1) -> str:
        assert old in good
        path = tmp_path / "recipe.yaml"
        path.write_text(good.replace(old, new))
        return refused("run", path, "-o", tmp_path / "out", *more, mistakes=mistakes)

    return run


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- calibrate", "- calibrat", "recipe.yaml:6: unknown pass 'calibrat'; did you mean 'calibrate'"),
        (
            "scheme: W8A8",
            "sheme: W8A8",
            "recipe.yaml:5: pass 'quantize' has no parameter 'sheme'; did you mean 'scheme'",
        ),
        ("scheme: W8A8", "scheme: W8B8", "recipe.yaml:5: pass 'quantize': parameter 'scheme': 'W8B8' is not a scheme"),
        ("samples: 32", "sample: 32", "recipe.yaml:2: unknown key 'sample' in calibration; did you mean 'samples'"),
        ("samples: 32", "samples: many", "recipe.yaml:2: calibration.samples"),
        ("- onnx-qdq", "- onnx-qqd", "unknown backend 'onnx-qqd'; did you mean 'onnx-qdq'"),
        ("- calibrate", "- clean", "'clean', takes a program at level float; here it is simulated"),
        ("scheme: W8A8", 'scheme: W8A8, ignore: ["pooller"]', "pooller"),
        ("- clean", "- clean: [", "recipe.yaml:"),
        ("samples: 32", "samples: 41", "is too short: 40 texts, 41 are needed"),
        ("sentences.txt", "sentense.txt", "sentense.txt does not exist"),
    ],
)
def test_recipes(recipe: Refused, old: str, new: str, message: str) -> None:
    assert message in recipe(old, new)


def test_two_mistakes_get_two_lines(recipe: Refused) -> None:
    lines = recipe("passes:", "passses:", mistakes=2)
    assert "recipe.yaml:3: unknown key 'passses'; did you mean 'passes'" in lines
    assert "recipe.yaml:1: the recipe needs the key 'passes'" in lines


def test_a_missing_recipe(refused: Refused, tmp_path: Path) -> None:
    assert "cannot read the recipe" in refused("run", tmp_path / "none.yaml", "-o", tmp_path / "out")


def test_a_pattern_that_matches_nothing(quantize: Refused) -> None:
    assert "encoder.layr" in quantize("--ignore", "encoder.layr.*")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"one\ntwo\n", "too short: 2 texts"), (b"a\xff\n", "line 1: byte 1 is not UTF-8")],
)
def test_calibration_files(quantize: Refused, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert message in quantize(calibration=path)


def test_a_missing_calibration_file_and_column(quantize: Refused, tmp_path: Path) -> None:
    assert "none.txt" in quantize(calibration=tmp_path / "none.txt")
    table = tmp_path / "a.tsv"
    table.write_text("sentence\tlabel\n" + "a cat\t1\n" * 20)
    assert "no column 'sentense'; did you mean 'sentence'" in quantize(calibration=f"{table}:sentense")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(quantize: Refused, own_bert: Path, value: float) -> None:
    weights = load_file(own_bert / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 5] = value
    save_file(weights, own_bert / "model.safetensors", metadata={"format": "pt"})
    assert "the weight 'encoder.layer.1.output.dense.weight' holds NaN or Inf" in quantize(model=own_bert)


def test_calibration_batches_that_are_not_finite(bert: Path) -> None:
    from bitlower.ir import BitlowerError
    from bitlower.tools.runs.flow import quantize

    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    batch = {"input": torch.randn(2, 4)}
    bad = {"input": torch.full((2, 4), torch.nan)}
    with pytest.raises(BitlowerError, match="calibration: the tensor 'input' of batch 1 holds NaN or Inf"):
        quantize(module, calibration=[batch, bad, batch], example_inputs=batch)


def test_weight_files(quantize: Refused, own_bert: Path) -> None:
    path = own_bert / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged" in quantize(model=own_bert)
    path.write_bytes(whole)
    weights = load_file(path)
    save_file(weights | {"pooler.dense.bias": torch.zeros(7)}, path, metadata={"format": "pt"})
    assert "the weight 'pooler.dense.bias' has the shape [7], config.json asks for [32]" in quantize(model=own_bert)
    del weights["pooler.dense.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "the weight 'pooler.dense.bias' is missing" in quantize(model=own_bert)
    path.unlink()
    assert "model.safetensors are missing" in quantize(model=own_bert)


def test_models(quantize: Refused, own_bert: Path, tmp_path: Path) -> None:
    assert "no model folder at" in quantize(model=own_bert / "none")
    assert "if it is a model of the hub, write hf:bert-base-uncased" in quantize(model="bert-base-uncased")
    assert "no package 'no-such-model' is installed" in quantize(model="package:no-such-model")
    path = own_bert / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoModel": "mine.Model"}}))
    assert "asks for remote code (`auto_map`), which is never run" in quantize(model=own_bert)
    path.write_text("{")
    assert "config.json is not JSON" in quantize(model=own_bert)


def test_outputs(quantize: Refused, texts: Path, tmp_path: Path, backend: SimpleNamespace) -> None:
    (tmp_path / "there").mkdir()
    assert "there exists already; choose another name" in quantize(output=tmp_path / "there")
    assert "there is not an artifact" in quantize("--overwrite", output=tmp_path / "there")
    assert f"{texts} is not a folder" in quantize(output=texts / "out")
    assert backend.calls == []


def test_a_parent_without_permission(quantize: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written: permission denied" in quantize()


RAISES = """
from dataclasses import dataclass
from bitlower.passes import Pass

@dataclass(frozen=True)
class Explode(Pass):
    name = "explode"

    def run(self, program):
        raise ValueError("boom")
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "plugin.py defines no pass"),
        ("1 / 0\n", "the plugin plugin.py fails to import: ZeroDivisionError: division by zero at plugin.py:1"),
        ("def\n", "the plugin plugin.py fails to import: SyntaxError"),
        (RAISES.replace("(frozen=True)", ""), "plugin.py"),
        (RAISES.replace('"explode"', '"clean"'), "the pass 'clean' is offered by"),
        (RAISES, "pass 'explode' failed: ValueError: boom at plugin.py:10"),
    ],
)
def test_plugins(recipe: Refused, tmp_path: Path, source: str, message: str) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(source)
    assert message in recipe("- clean", "- clean\n  - explode", "--plugin", plugin)


def test_a_missing_plugin(recipe: Refused, tmp_path: Path) -> None:
    assert "no plugin file" in recipe("- clean", "- clean", "--plugin", tmp_path / "none.py")


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "writer", ["bitlower.passes._machinery.cache.write_checked", "pathlib.Path.write_text", "os.fsync"]
)
def test_a_full_disk(quantize: Refused, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    monkeypatch.setattr(writer, full)
    line = quantize()
    assert "the disk is full" in line or "No space left on device" in line
    assert "free some space" in line


def test_usage(refused: Refused) -> None:
    assert "No such command 'runn'" in refused("runn")
    assert "No such option: --schem" in refused("quantize", "x", "--schem", "W8A8")
    assert "Missing option" in refused("analyze", "x")
    assert "exclude each other" in refused(
        "quantize", ".", "--calibration", "y", "-o", "z", "--cache", "c", "--no-cache"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "ranges need calibration data; give texts to calibrate on: --calibration FILE"),
        (
            ("--scheme", "W4A16-g128", "--algorithm", "gptq"),
            "--calibration FILE (`calibration` in Python), or round to",
        ),
        (("--scheme", "int8"), "'int8' is not a scheme; did you mean W8A8 (static"),
        (("--scheme", "Q4_K_M"), "did you mean W4A16-g32-asym"),
        (("--scheme", "nf4"), "grids are of equal steps here"),
        (("--algorithm", "awq"), "unknown algorithm 'awq'; awq's scales protect channels"),
        (("--algorithm", "auto-round"), "it trains: the pass `autoround`"),
        (("--algorithm", "gptk"), "did you mean 'gptq'?"),
        (("--format", "gguf"), "unknown format 'gguf'"),
        (("--format", "ONNX"), "did you mean onnx-qdq?"),
    ],
)
def test_words_of_other_tools_and_missing_data(
    refused: Refused, bert: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused("quantize", bert, *options)
    if options and "--calibration" not in message:  # a plan needs no data
        assert message in refused("plan", bert, *options)


def test_plans_check_what_runs_would(refused: Refused, bert: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "there exists already" in refused("plan", bert, "-o", tmp_path / "there")
    assert "is no condition" in refused("plan", bert, "--fail-if", "small")
    assert "none.txt does not exist" in refused("plan", bert, "--calibration", tmp_path / "none.txt")


def test_errors_for_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path), "--json"]) == 2
    out, err = capsys.readouterr()
    form = json.loads(out)
    assert form["exit_code"] == 2
    assert form["error"].startswith(f"{tmp_path} is not an artifact")
    assert err == f"error: {form['error']}\n"


def test_models_with_other_tokenizers_are_not_run_to_be_compared(refused: Refused, llama: Path, texts: Path) -> None:
    """The other model's weights are never read: it has none."""
    other = texts.parent / "other"
    shutil.copytree(llama, other, ignore=shutil.ignore_patterns("*.safetensors"))
    form = json.loads((other / "tokenizer.json").read_text())
    words = form["model"]["vocab"]
    form["model"]["vocab"] = {word: len(words) - 1 - place for word, place in words.items()}
    form["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(form))
    line = refused("eval", llama, "--task", "text-generation", "--data", texts, "--compare", other)
    assert "split texts into other tokens" in line
    assert "compare models that have the same tokenizer" in line
