"""Sound files as features and targets, against transformers' own extractor; and files that are no sound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from bitlower.frontends import batches
from bitlower.frontends.sound import read_sound, sound_batches, speech_prompt, stop_token
from bitlower.ir import BitlowerError, Program
from bitlower.ir.assets import read_assets
from bitlower.ir.generation import program_stages, write_targets

RATE = 16_000
TEXTS = ["the cat sings", "bird"]


def tone(seconds: float, rate: int = RATE, pitch: float = 440.0) -> np.ndarray[Any, Any]:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Program:
    folder = seq2seq.save("whisper", tmp_path_factory.mktemp("whisper"))
    return replace(seq2seq.traced("whisper"), assets=read_assets(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sounds")
    paths = [folder / "a.wav", folder / "b.flac"]
    soundfile.write(paths[0], tone(0.5), RATE)
    soundfile.write(paths[1], np.stack([tone(0.8, 48_000), tone(0.8, 48_000, 660)], 1), 48_000)
    return paths


def test_features_are_those_of_transformers(program: Program, files: list[Path]) -> None:
    (batch,) = sound_batches(program, files[:1], TEXTS[:1], max_length=16, batch_size=2).batches
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    samples, _ = soundfile.read(files[0], dtype="float32")
    expected = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"], expected)
    assert batch["input_features"].shape == (1, 8, 100)


def test_targets_begin_with_language_and_task(program: Program, files: list[Path]) -> None:
    pairs = sound_batches(program, files, TEXTS, max_length=16, batch_size=2)
    names = {token: number for token, number in json.loads(program.assets["tokenizer.json"])["model"]["vocab"].items()}
    prompt = [names[token] for token in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
    assert speech_prompt(program) == prompt
    (batch,) = pairs.batches
    words = [[names[word] for word in text.split()] for text in TEXTS]
    rows = [row[mask.bool()].tolist() for row, mask in zip(
        batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True
    )]  # fmt: skip
    assert rows == [prompt + word for word in words]
    assert bool(torch.isfinite(program(**batch)["logits"]).all())
    assert torch.equal(
        batches(program, [str(path) for path in files], pairs=TEXTS)[0]["input_features"], batch["input_features"]
    )
    assert speech_prompt(program, "de")[1] == names["<|de|>"]
    with pytest.raises(BitlowerError, match=r"has no token <\|fr\|>"):
        speech_prompt(program, "fr")


def test_channels_are_averaged_and_rates_converted(files: list[Path]) -> None:
    samples = read_sound(files[1], RATE)
    assert abs(len(samples) - 0.8 * RATE) <= 1
    spectrum = np.abs(np.fft.rfft(samples))
    peaks = sorted(np.argsort(spectrum)[-2:] * RATE / len(samples))
    assert np.allclose(peaks, [440, 660], atol=2)


def test_what_is_longer_than_the_model_hears_is_cut_and_counted(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(1.5), RATE)
    pairs = sound_batches(program, [path], ["the cat sings the cat sings"], max_length=6, batch_size=1)
    assert (pairs.cut_sources, pairs.cut_targets) == (1, 1)
    assert pairs.batches[0]["decoder_input_ids"].shape == (1, 6)


def test_without_texts_the_model_writes_them(program: Program, files: list[Path]) -> None:
    (batch,) = sound_batches(program, files, None, max_length=12, batch_size=2).batches
    start = torch.tensor([speech_prompt(program)] * 2)
    source = {"input_features": batch["input_features"]}
    own = write_targets(
        program, *program_stages(program), source, start=start, stops=[stop_token(program)], max_new_tokens=12
    )
    for row, mask, expected in zip(batch["decoder_input_ids"], batch["decoder_attention_mask"], own, strict=True):
        count = int(mask.sum())
        assert torch.equal(row[:count], expected[:count])
        assert stop_token(program) not in row[4:count].tolist()


def test_bad_files_are_named(program: Program, tmp_path: Path) -> None:
    text, empty, cut = tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "cut.flac"
    text.write_text("this is no sound")
    soundfile.write(empty, tone(0), RATE)
    soundfile.write(cut, tone(1.0) + 0.01 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32), RATE)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for path, message in (
        (tmp_path / "none.wav", "none.wav is missing"),
        (text, "text.wav is no sound that can be read"),
        (empty, "empty.wav is empty"),
        (cut, r"cut\.flac (is cut off|is no sound that can be read)"),
    ):
        with pytest.raises(BitlowerError, match=message):
            sound_batches(program, [path], ["bird"], max_length=8, batch_size=1)


def test_an_extractor_of_another_model_is_refused(program: Program, files: list[Path]) -> None:
    other = replace(program, assets={**program.assets, "preprocessor_config.json": b'{"feature_size": 16}'})
    with pytest.raises(BitlowerError, match="makes features of 16 bins, the model takes 8 × 100"):
        sound_batches(other, files, TEXTS, max_length=8, batch_size=1)
