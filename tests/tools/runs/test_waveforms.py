"""Models that hear sound alone from their folders and a folder of sounds to verified artifacts, measured on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

import bitlower
from bitlower.frontends import batches, load
from bitlower.ir import BitlowerError
from bitlower.ir.quiet import quiet
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.training._report import TrainReport
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.runs.flow import quantize

RATE = 16_000


@pytest.fixture(scope="module")
def folders(sound_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    sound_models.save_tones(root / "sounds", 20)
    for name in ("ast", "wav2vec2-layer", "wav2vec2"):
        sound_models.save(name, root / name)
    return root


@pytest.fixture(scope="module")
def runs(folders: Path) -> dict[str, Path]:
    """Artifacts in W8A8."""
    made = {}
    for name in ("ast", "wav2vec2-layer"):
        done = quantize(folders / name, calibration=folders / "sounds", samples=16, output=folders / f"{name}-w8a8")
        assert done.output is not None
        made[name] = done.output
    return made


def winners(folder: Path, paths: list[Path], head: str) -> list[torch.Tensor]:
    """What transformers finds likeliest, one file at a time: a class, or a token of each frame."""
    with quiet():
        model = getattr(transformers, head).from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    results = []
    for path in paths:
        samples = soundfile.read(path, dtype="float32")[0]
        with torch.no_grad():
            logits = model(**extractor(samples, sampling_rate=RATE, return_tensors="pt")).logits[0]
        results.append(logits.argmax(-1))
    return results


@pytest.mark.parametrize("name", ["ast", "wav2vec2-layer"])
def test_the_artifact_computes_what_transformers_does(
    sound_models: Any, name: str, runs: dict[str, Path], folders: Path, tmp_path: Path
) -> None:
    head = "AutoModelForAudioClassification" if name == "ast" else "AutoModelForCTC"
    with quiet():
        model = getattr(transformers, head).from_pretrained(folders / name).eval()
    artifact = bitlower.load(runs[name])
    paths = [str(path) for path in sound_models.save_tones(tmp_path, 4, seed=7)]
    for part in (paths[:1], paths[1:]):
        (batch,) = batches(artifact.program, part)
        with torch.no_grad():
            expected = model(**batch).logits
        value = torch.as_tensor(artifact(**batch)["logits"])
        assert value.shape == expected.shape
        assert float(torch.cosine_similarity(value.flatten(), expected.flatten(), 0)) > 0.99


def test_every_product_is_quantized_or_named(runs: dict[str, Path]) -> None:
    kernels = {name: json.loads((path / "verification.json").read_text())["kernels"] for name, path in runs.items()}
    assert kernels["ast"]["integer"] == {"MatMulIntegerToFloat": 8}  # patches, attention, feed-forward, the head
    assert set(kernels["ast"]["floating"]) == {"Attention"}
    waves = kernels["wav2vec2-layer"]
    assert sum(waves["integer"].values()) == 2 + 1 + 6 + 1  # convolutions, projection, a layer, the head
    assert waves["float_reasons"] == {"a convolution runs in groups of channels": 1}
    assert set(waves["floating"]) == {"Attention", "Conv"}


def test_classes_of_sounds_are_those_of_transformers(sound_models: Any, folders: Path, tmp_path: Path) -> None:
    paths = sound_models.save_tones(tmp_path, 8, seed=5)
    found = [int(winner) for winner in winners(folders / "ast", paths, "AutoModelForAudioClassification")]
    labels = [str(winner if place % 4 else (winner + 1) % 3) for place, winner in enumerate(found)]
    table = tmp_path / "data.csv"
    table.write_text("path,label\n" + "".join(f"{p.name},{label}\n" for p, label in zip(paths, labels, strict=True)))
    result = evaluate(folders / "ast", "audio-classification", table, batch_size=3)
    assert (result.samples, result.metrics) == (8, {"accuracy": 75.0})
    with pytest.raises(BitlowerError, match="audio-classification needs a model that classifies sounds"):
        evaluate(folders / "wav2vec2", "audio-classification", table)


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-layer"])
def test_what_is_heard_is_what_transformers_decodes(
    sound_models: Any, name: str, folders: Path, tmp_path: Path
) -> None:
    """A reference that is what the model says has no errors, and one with a letter more has one."""
    pytest.importorskip("jiwer")
    paths = sound_models.save_tones(tmp_path, 4, seed=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / name)
    said = [tokenizer.decode(frames) for frames in winners(folders / name, paths, "AutoModelForCTC")]
    assert all(said)
    table = tmp_path / "data.tsv"
    for more, errors in (("", 0), (" aba", 4)):
        rows = [f"{path.name}\t{text}{more}" for path, text in zip(paths, said, strict=True)]
        table.write_text("\n".join(["path\ttext", *rows]) + "\n")
        result = evaluate(load(folders / name), "speech-recognition", f"{table}:path,text", batch_size=4)
        words = sum(len(BasicTextNormalizer()(f"{text}{more}").split()) for text in said)
        assert result.metrics["wer"] == pytest.approx(100 * errors / words)
    with pytest.raises(BitlowerError, match="has no beams"):
        evaluate(load(folders / name), "speech-recognition", f"{table}:path,text", beams=2)


def test_a_checkpoint_holds_lengths_and_directions(folders: Path, tmp_path: Path) -> None:
    """Transformers loads what is written; a projection that it draws anew is refused where it cannot be unfolded."""
    layer = "wav2vec2.feature_projection.projection"
    with pytest.raises(BitlowerError, match=rf"{layer} is initialized by .*; leave it in float, .*projection"):
        quantize(folders / "wav2vec2", scheme="W8A16", formats=["gptq-v2"], output=tmp_path / "none")
    done = quantize(folders / "wav2vec2", scheme="W8A16", formats=["compressed-tensors"], output=tmp_path / "out")
    assert done.output is not None
    assert layer in {row["path"] for row in json.loads((done.output / "manifest.json").read_text())["tensors"]}
    figures = json.loads((done.output / "verification.json").read_text())["summary"]
    assert (figures["client"], figures["output_cosine"] > 0.999) == ("transformers", True)


def test_bad_sounds_are_named_before_the_model_is_loaded(
    sound_models: Any, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("bitlower.tools.runs.flow.load", refuse)
    bad = sound_models.save_tones(tmp_path / "sounds", 9)[4]
    bad.write_text("this is no sound")
    for data in (tmp_path / "sounds", [str(path) for path in sorted((tmp_path / "sounds").iterdir())]):
        with pytest.raises(BitlowerError, match=r"04.wav is no sound that can be read"):
            quantize(folders / "ast", calibration=data, output=tmp_path / "out")
    with pytest.raises(BitlowerError, match="max_length is in tokens, and this model reads sounds"):
        quantize(folders / "ast", calibration=tmp_path / "sounds", max_length=64, output=tmp_path / "out")
    with pytest.raises(BitlowerError, match=r"the folder .* has no sounds; files that end with .aif"):
        quantize(folders / "ast", calibration=folders / "ast", output=tmp_path / "out")


def test_frames_of_sound_are_trained_on(sound_models: Any, folders: Path, tmp_path: Path) -> None:
    """The divergence of all frames' logits from the float model's falls, whatever the mask of the samples says."""
    program = load(folders / "wav2vec2-layer")
    paths = [str(path) for path in sound_models.save_tones(tmp_path, 12)]
    made = batches(program, paths, batch_size=3)
    context = Context(made[:3], made[3:], training=made[:3], held_out=made[3:])
    pipeline = "clean,quantize{scheme=W3A16},calibrate,qat{steps=12 evaluate-every=4}"
    PassManager(parse_pipeline(pipeline)).run(program, context)
    curve = [point.held_out for point in context[TrainReport].curve if point.held_out is not None]
    assert curve[0] > curve[1] > curve[2]
