"""Sound files that data files name are looked at before the model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bitlower.frontends.task import is_speech_reader
from bitlower.ir import BitlowerError
from bitlower.tools.data.named_rows import SOUNDS, NamedRows
from bitlower.tools.data.texts import Row
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.runs.flow import analyze_model, quantize, recipe_job

PAIR = "column: [source, target]"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Path:
    return seq2seq.save("whisper", tmp_path_factory.mktemp("whisper"))


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    for place in ("runs.flow.load", "evaluation.runners.load"):
        monkeypatch.setattr(f"bitlower.tools.{place}", refuse)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten sounds; that of line 6 is a text."""
    for place in range(10):
        soundfile.write(tmp_path / f"{place}.wav", 0.1 * np.ones(100, np.float32), 16_000)
    (tmp_path / "4.wav").write_text("this is no sound")
    path = tmp_path / "data.tsv"
    path.write_text("source\ttarget\n" + "".join(f"{place}.wav\tthe cat\n" for place in range(10)))
    return path


def test_rows_are_named_by_file_and_line(table: Path) -> None:
    good = [Row(2, ("0.wav", "the cat"))]
    NamedRows(table, lambda: good).check(SOUNDS)
    for name, message in (("4.wav", "4.wav is no sound that can be read"), ("no.wav", "no.wav is missing")):
        rows = NamedRows(table, lambda name=name: [*good, Row(7, (name, ""))])
        with pytest.raises(BitlowerError, match=rf"data\.tsv, line 7: .*{message}"):
            rows.check(SOUNDS)
    soundfile.write(table.parent / "empty.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(BitlowerError, match=r"data\.tsv, line 3: .*empty.wav is empty; leave it out"):
        NamedRows(table, lambda: [Row(3, ("empty.wav",))]).check(SOUNDS)
    rows = NamedRows.of_texts(table, ["source", "target"], [("0.wav", "the cat"), ("3.wav", "the cat")])
    assert [row.line for row in rows.read()] == [2, 5]
    rows.check(SOUNDS)


def test_a_package_that_is_missing_is_named_alone(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BitlowerError, match=r"^reading sound needs the package soundfile"):
        NamedRows(table, list).check(SOUNDS)


def test_an_evaluation_looks_first(whisper: Path, table: Path) -> None:
    with pytest.raises(BitlowerError, match=r"data\.tsv, line 6: .*4.wav is no sound that can be read"):
        evaluate(whisper, "speech-recognition", f"{table}:source,target")


def test_a_run_looks_first(whisper: Path, table: Path, tmp_path: Path) -> None:
    message, data = r"data.tsv, line 6: .*4.wav is no sound that can be read", f"{table}:source,target"
    with pytest.raises(BitlowerError, match=message):
        quantize(whisper, calibration=data, samples=10, output=tmp_path / "out")
    with pytest.raises(BitlowerError, match=message):
        analyze_model(whisper, data, samples=10)
    texts = tmp_path / "good.tsv"
    texts.write_text("source\ttarget\n" + "0.wav\tthe cat\n" * 10)
    section = f"calibration: {{data: good.tsv, {PAIR}, samples: 8}}\n"
    recipe = tmp_path / "recipe.yaml"
    for other in (f"evaluation: {{data: data.tsv, {PAIR}, samples: 10}}\n", f"training: {{data: data.tsv, {PAIR}}}\n"):
        training = ", {qat: {steps: 2}}" if "training" in other else ""
        passes = f"passes: [clean, {{quantize: {{scheme: W8A8}}}}, calibrate{training}, lower-integer]\n"
        recipe.write_text(f"model: {{path: {whisper}}}\n{section}{other}{passes}export: [onnx-qdq]\n")
        with pytest.raises(BitlowerError, match=message):
            recipe_job(load_recipe(recipe))


def test_models_of_text_read_no_sound(whisper: Path, bert: Path, table: Path) -> None:
    assert is_speech_reader(whisper)
    assert is_speech_reader(whisper, "automatic-speech-recognition")
    assert not is_speech_reader(whisper, "feature-extraction")
    assert not is_speech_reader(bert)
    recipe = table.parent / "recipe.yaml"
    section = "calibration: {data: data.tsv, column: target, samples: 8}\n"
    recipe.write_text(f"model: {{path: {bert}}}\n{section}passes: [clean]\nexport: [onnx-qdq]\n")
    recipe_job(load_recipe(recipe))
