"""Tiny models of sound with random weights, in folders as Hugging Face has them, and files of tones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers

RATE = 16_000
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WAVES = {
    **SIZES, "vocab_size": 8, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERED = {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
LABELS = {"id2label": {0: "dog", 1: "rain", 2: "bell"}, "label2id": {"dog": 0, "rain": 1, "bell": 2}}
SPECTRUM = {**SIZES, **LABELS, "max_length": 24, "num_mel_bins": 16, "patch_size": 8}
SPECTRUM |= {"time_stride": 8, "frequency_stride": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2", "ForCTC", WAVES),
    "wav2vec2-layer": ("Wav2Vec2", "ForCTC", LAYERED),
    "hubert": ("Hubert", "ForCTC", WAVES),
    "wav2vec2-classes": ("Wav2Vec2", "ForSequenceClassification", {**LAYERED, **LABELS, "classifier_proj_size": 8}),
    "ast": ("AST", "ForAudioClassification", SPECTRUM),
}


def build(name: str) -> Any:
    """A model with weights large enough that each part matters."""
    family, head, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def save(name: str, folder: Path) -> Path:
    """The model of :func:`build` with its extractor's settings, and a tokenizer of letters if it writes."""
    build(name).save_pretrained(folder)
    if name == "ast":
        transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=24).save_pretrained(folder)
        return folder
    masked = name != "wav2vec2" and name != "hubert"
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)
    if MODELS[name][1] == "ForCTC":
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c"]
        (folder / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


def save_tones(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Files of a tone in noise, 0.1 to 0.2 seconds long, WAV and FLAC in turn."""
    folder.mkdir(exist_ok=True, parents=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        times = np.arange(int(RATE * (0.1 + 0.1 * number / count))) / RATE
        tone = np.sin(2 * np.pi * generator.uniform(200, 3000) * times) + 0.3 * generator.standard_normal(len(times))
        paths.append(folder / f"{number:02}.{'flac' if number % 2 else 'wav'}")
        soundfile.write(paths[-1], (0.3 * tone / np.abs(tone).max()).astype(np.float32), RATE)
    return paths
