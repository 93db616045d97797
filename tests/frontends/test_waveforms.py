"""Models that hear sound alone, against transformers: samples with and without a mask, spectrograms, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers

from bitlower.frontends import batches, load
from bitlower.frontends.task import is_sound_model
from bitlower.frontends.tokenize import random_windows
from bitlower.frontends.waveforms import own_frames, spoken
from bitlower.ir import BitlowerError, Program
from bitlower.ir.verifier import verify

Folders = Callable[[str], Path]
NAMES = ("wav2vec2", "wav2vec2-layer", "hubert", "wav2vec2-classes", "ast")
RATE = 16_000


@pytest.fixture(scope="module")
def folder_of(sound_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder_of("ast")``: a folder with that model."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: sound_models.save(name, root / name))


def sounds(program: Program, rows: int, samples: int) -> dict[str, torch.Tensor]:
    """Noise of so many samples; where there is a mask the first row ends early."""
    generator = torch.Generator().manual_seed(rows)
    shape = [samples if size == "samples" else size for size in program.inputs[0].type.shape[1:]]
    batch = {"input_values": torch.randn([rows, *map(int, shape)], generator=generator)}
    if len(program.inputs) > 1:
        batch["attention_mask"] = torch.ones(rows, samples, dtype=torch.int64)
        batch["attention_mask"][0, samples // 2 :] = 0
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_and_an_object_give_the_outputs_of_transformers(
    sound_models: Any, name: str, folder_of: Folders
) -> None:
    model: Any = sound_models.build(name)
    program = load(folder_of(name))
    verify(program)
    assert program.task == ("ctc" if sound_models.MODELS[name][1] == "ForCTC" else "audio-classification")
    assert is_sound_model(model)
    masked = name in ("wav2vec2-layer", "wav2vec2-classes")
    shape = ("batch", 24, 16) if name == "ast" else ("batch", "samples")
    assert [spec.type.shape for spec in program.inputs] == [shape] * (2 if masked else 1)
    for rows, samples in ((1, 401), (3, 236)):
        batch = sounds(program, rows, samples)
        with torch.no_grad():
            expected = model(**batch).logits
        for traced in (program, load(model)):
            assert torch.allclose(traced(**batch)["logits"], expected, atol=1e-5, rtol=1e-4)


def test_a_sound_that_is_too_short_is_padded_with_silence(folder_of: Folders) -> None:
    program = load(folder_of("wav2vec2"))
    least = program.lengths["samples"].minimum
    short = torch.randn(2, least - 5)
    padded = torch.cat([short, torch.zeros(2, 5)], 1)
    assert torch.equal(program(input_values=short)["logits"], program(input_values=padded)["logits"])


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-layer", "ast"])
def test_files_become_what_the_extractor_of_transformers_makes_of_them(
    sound_models: Any, name: str, folder_of: Folders, tmp_path: Path
) -> None:
    folder, paths = folder_of(name), sound_models.save_tones(tmp_path, 3)
    program = load(folder)
    first, second = batches(program, [str(path) for path in paths], batch_size=2)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    samples = [soundfile.read(path, dtype="float32")[0] for path in paths]
    for batch, part in ((first, samples[:2]), (second, samples[2:])):
        how = {} if name == "ast" else {"padding": True}
        expected = extractor(part, sampling_rate=RATE, return_tensors="pt", **how)
        assert batch.keys() == ({"input_values", "attention_mask"} if name == "wav2vec2-layer" else {"input_values"})
        for key, value in batch.items():
            assert torch.equal(value, expected[key].to(value.dtype))
        program(**batch)


def test_frames_that_are_padding_do_not_count_and_repeated_tokens_are_one(
    sound_models: Any, folder_of: Folders
) -> None:
    program = load(folder_of("wav2vec2-layer"))
    model = sound_models.build("wav2vec2-layer")
    batch = sounds(program, 2, 402)
    counted = [int(model._get_feat_extract_output_lengths(int(n))) for n in batch["attention_mask"].sum(1)]
    assert own_frames(program, batch) == counted
    assert spoken(program, torch.tensor([5, 5, 0, 5, 6, 6, 4, 4, 7])) == "aab c"


def test_sounds_are_drawn_for_checks_that_need_no_data(folder_of: Folders) -> None:
    for name, shape in (("wav2vec2-layer", (1, RATE)), ("ast", (1, 24, 16))):
        first, second = random_windows(load(folder_of(name)))
        assert first["input_values"].shape == shape
        assert not torch.equal(first["input_values"], second["input_values"])
        assert "attention_mask" not in first or bool(first["attention_mask"].all())


def test_settings_that_are_missing_or_of_another_model_are_named(
    sound_models: Any, folder_of: Folders, tmp_path: Path
) -> None:
    program, path = load(folder_of("ast")), str(sound_models.save_tones(tmp_path, 1)[0])
    settings = json.loads(program.assets["preprocessor_config.json"])
    program.assets = {"preprocessor_config.json": json.dumps({**settings, "num_mel_bins": 32}).encode()}
    with pytest.raises(
        BitlowerError, match=r"preprocessor_config.json makes 24 × 32 of a sound, and the model takes 24"
    ):
        batches(program, [path])
    program.assets = {}
    with pytest.raises(BitlowerError, match=r"has no preprocessor_config.json, which says how its sounds are prepared"):
        batches(program, [path])
    program.assets = {"preprocessor_config.json": b'{"feature_extractor_type": "None"}'}
    with pytest.raises(BitlowerError, match=r"the feature extractor of .* cannot be loaded"):
        batches(program, [path])


def test_other_sounds_and_other_tasks_are_refused(folder_of: Folders) -> None:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=8
    )
    message = r"Wav2Vec2BertForCTC reads input_features, and ctc is for models of samples .* spectrograms of one size"
    with pytest.raises(BitlowerError, match=message):
        load(transformers.Wav2Vec2BertForCTC(config))
    with pytest.raises(BitlowerError, match=r"Wav2Vec2ForCTC hears sound alone, .*; name ctc as the task"):
        load(folder_of("wav2vec2"), task="automatic-speech-recognition")
