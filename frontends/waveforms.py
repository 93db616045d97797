"""From sound files to batches of a model that hears sound alone, in one run (AST, wav2vec 2.0, HuBERT).

Files are read as :mod:`bitlower.frontends.sound` reads them, and prepared by the model's own feature extractor, as its
``preprocessor_config.json`` says: normalized, or turned into a log-mel spectrogram.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitlower.frontends._assets import loading, unpacked
from bitlower.frontends._sounds import EXTRACTOR, sound_settings
from bitlower.frontends._tokenizer import tokenizer_of
from bitlower.frontends.sound import read_sound
from bitlower.ir import BitlowerError, Program
from bitlower.ir.quiet import quiet
from bitlower.ir.tokens import MASK, SAMPLES, SOUND

ENDINGS = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".ogg", ".opus", ".wav")
"""Endings of the names of sound files that libsndfile reads, in small letters."""
_RATE = 16_000
"""Samples a second of sounds that are drawn."""


def reads_waveforms(program: Program) -> bool:
    """Whether ``program`` reads sounds alone, as samples or as spectrograms of one size."""
    return {spec.name for spec in program.inputs} in ({SOUND}, {SOUND, MASK})


def random_waveforms(program: Program, *, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one second of noise, float32, normalized as sounds are; or of one spectrogram of noise.

    Args:
        program: of :func:`reads_waveforms`.
        count: of batches.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        batch = {}
        for spec in program.inputs:
            shape = [_RATE if size == SAMPLES else size for size in spec.type.shape[1:]]
            drawn = torch.randn([1, *map(int, shape)], generator=generator)
            batch[spec.name] = torch.ones_like(drawn, dtype=torch.int64) if spec.name == MASK else drawn
        result.append(batch)
    return result


def waveform_batches(program: Program, paths: Sequence[Path], *, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batches in the order of ``paths``; samples are padded to the longest of the batch.

    Args:
        program: of :func:`reads_waveforms`, with the settings of its feature extractor among its assets.
        paths: sound files that libsndfile reads, of any rate and number of channels.
        batch_size: files in a batch.

    Raises:
        BitlowerError: a file is missing, no sound, empty or cut off, a package is missing, there are no settings, or
            they make something else than the model takes.
    """
    extractor, result = feature_extractor(program), []
    names = [spec.name for spec in program.inputs]
    for first in range(0, len(paths), batch_size):
        sounds = [read_sound(path, extractor.sampling_rate) for path in paths[first : first + batch_size]]
        padding: dict[str, Any] = {"padding": True, "return_attention_mask": MASK in names} if _samples(program) else {}
        made = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding)
        batch = {name: made[name] for name in names}
        batch[SOUND] = batch[SOUND].float()
        _check_shape(program, batch[SOUND])
        result.append({name: value.long() if name == MASK else value for name, value in batch.items()})
    return result


def feature_extractor(program: Program) -> Any:
    """Transformers' feature extractor, from the files that go along with ``program``.

    Raises:
        BitlowerError: there are none, or they cannot be loaded.
    """
    owner = program.source or "the model"
    if not sound_settings(program.assets):
        raise BitlowerError(
            f"{owner} has no {EXTRACTOR}, which says how its sounds are prepared",
            hint=f"put {EXTRACTOR} beside config.json, or give batches of tensors",
        )
    with loading("feature extractor", owner, f"check {EXTRACTOR}"):
        return _extractor(program.assets[EXTRACTOR], json.dumps(program.config))


@lru_cache(maxsize=2)
def _extractor(settings: bytes, config: str) -> Any:
    from transformers import AutoFeatureExtractor

    with unpacked([(EXTRACTOR, settings)], config) as folder, quiet():
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def spoken(program: Program, frames: torch.Tensor) -> str:
    """What the most likely token of each frame says, ``[frames]`` int64: repeated ones once, and no blanks.

    Greedy decoding of connectionist temporal classification (Graves et al., 2006, 3.2), as the tokenizer does it.

    Raises:
        BitlowerError: the program has no tokenizer.
    """
    return str(tokenizer_of(program).decode(frames.tolist()))


def own_frames(program: Program, batch: Mapping[str, torch.Tensor]) -> list[int]:
    """How many frames of each row of ``batch`` its convolutions make of samples that are no padding."""
    mask = batch.get(MASK)
    counts = [int(n) for n in mask.sum(1)] if mask is not None else [batch[SOUND].shape[1]] * len(batch[SOUND])
    for kernel, stride in zip(program.config["conv_kernel"], program.config["conv_stride"], strict=True):
        counts = [(count - kernel) // stride + 1 for count in counts]
    return counts


def _samples(program: Program) -> bool:
    return any(SAMPLES in spec.type.shape for spec in program.inputs)


def _check_shape(program: Program, values: torch.Tensor) -> None:
    """See that what an extractor made is what the model takes.

    Raises:
        BitlowerError: it is not.
    """
    wanted = next(spec.type.shape for spec in program.inputs if spec.name == SOUND)[1:]
    made = tuple(values.shape[1:])
    if len(made) != len(wanted) or any(isinstance(a, int) and a != b for a, b in zip(wanted, made, strict=True)):
        ours, theirs = (" × ".join(map(str, sizes)) for sizes in (wanted, made))
        raise BitlowerError(
            f"{EXTRACTOR} makes {theirs} of a sound, and the model takes {ours}",
            hint=f"take the {EXTRACTOR} of this model",
        )
