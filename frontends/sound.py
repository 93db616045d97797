"""From sound files to batches of a model that writes what is said in them (Whisper, Radford et al., 2022).

Files are read by soundfile and resampled by soxr (``pip install bitlower[sound]``), and become log-mel features as the
model's own feature extractor makes them. A target begins with the tokens that tell the model its language and its task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._tokenizer import tokenizer_of
from bitlower.frontends.pairs import PairBatches, padded
from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import check_name
from bitlower.ir.generation import own_targets
from bitlower.ir.tokens import TARGET, TARGET_MASK

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FEATURES = "input_features"
EXTRACTOR = "preprocessor_config.json"
LANGUAGE = "en"
_START, _END = "<|startoftranscript|>", "<|endoftext|>"
_TASK, _PLAIN = "<|transcribe|>", "<|notimestamps|>"
_OWN = 128
"""Tokens of a transcript that the model writes itself, at most."""


def reads_sound(program: Program) -> bool:
    """Whether ``program`` reads features of sound and writes a text."""
    names = {spec.name for spec in program.inputs}
    return {FEATURES, TARGET} <= names


def sound_batches(
    program: Program,
    paths: Sequence[Path],
    texts: Sequence[str] | None,
    *,
    max_length: int,
    batch_size: int,
    language: str = LANGUAGE,
) -> PairBatches:
    """Batches in the order of ``paths``: features in float32, and targets padded to the longest of the batch.

    Args:
        program: of :func:`reads_sound`, with tokenizer files among its assets.
        paths: sound files that libsndfile reads, of any rate and number of channels.
        texts: what is said in each; None: what the model writes itself.
        max_length: tokens of a target at most.
        batch_size: files in a batch.
        language: as the tokens of the model name it.

    Raises:
        BitlowerError: a file is missing, no sound, empty or cut off, a package is missing, or the tokenizer does not
            know the language.
    """
    prompt, ends = speech_prompt(program, language), stop_token(program)
    extractor = feature_extractor(program)
    limit = min(max_length, program.context_length or max_length)
    longest = extractor.n_samples
    rows, cut_targets = _targets(program, texts, prompt, limit) if texts is not None else (None, 0)
    batches: list[dict[str, torch.Tensor]] = []
    cut_sounds = 0
    for first in range(0, len(paths), batch_size):
        sounds = [read_sound(path, extractor.sampling_rate) for path in paths[first : first + batch_size]]
        cut_sounds += sum(len(sound) > longest for sound in sounds)
        source = {FEATURES: features(extractor, sounds)}
        if rows is not None:
            targets = rows[first : first + batch_size]
        else:
            targets = own_targets(program, source, prompt, [ends], min(limit, _OWN))
        ids, mask = padded(targets, ends)
        batches.append({**source, TARGET: ids, TARGET_MASK: mask})
    return PairBatches(batches, cut_sounds, cut_targets)


def feature_extractor(program: Program) -> Any:
    """The feature extractor that lies beside the model, or one of the sizes that the model takes.

    Raises:
        BitlowerError: its features have other sizes than the model takes.
    """
    from transformers import WhisperFeatureExtractor

    bins, frames = next(spec for spec in program.inputs if spec.name == FEATURES).type.shape[1:]
    said = json.loads(program.assets.get(EXTRACTOR, b"{}"))
    known = {key: said[key] for key in ("feature_size", "sampling_rate", "hop_length", "n_fft") if key in said}
    extractor = WhisperFeatureExtractor(**{"feature_size": bins, **known})
    seconds, rest = divmod(int(frames) * extractor.hop_length, extractor.sampling_rate)
    if extractor.feature_size != bins or rest:
        raise BitlowerError(
            f"{EXTRACTOR} makes features of {extractor.feature_size} bins, the model takes {bins} × {frames}",
            hint=f"take the {EXTRACTOR} of this model",
        )
    return WhisperFeatureExtractor(**{"feature_size": bins, **known, "chunk_length": seconds})


def features(extractor: Any, sounds: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """The log-mel features of ``sounds``, ``[files, bins, frames]`` float32; shorter ones end with silence."""
    made = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    values: torch.Tensor = made[FEATURES].float()
    return values


def read_sound(path: Path, rate: int) -> NDArray[np.float32]:
    """The samples of a file at ``rate`` a second, ``[n]`` float32; the mean of its channels.

    Raises:
        BitlowerError: the file is missing, no sound, empty or cut off, or the packages are not installed.
    """
    with _sound_file(path) as file:
        promised, own_rate = file.frames, file.samplerate
        samples = file.read(dtype="float32", always_2d=True)
    if len(samples) < promised:
        raise BitlowerError(f"the sound file {path} is cut off: it has {len(samples)} of {promised} samples")
    mono: NDArray[np.float32] = samples.mean(1)
    return mono if own_rate == rate else sound_packages()[1].resample(mono, own_rate, rate)


def check_sound(path: Path) -> None:
    """See that a sound file is there and has samples, as its header says; no more of it is read.

    Raises:
        BitlowerError: the file is missing, no sound or empty, or the packages are not installed.
    """
    with _sound_file(path):
        pass


def sound_packages() -> tuple[Any, Any]:
    """The packages that read and resample sound.

    Raises:
        BitlowerError: one is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise BitlowerError(
            f"reading sound needs the package {error.name}", hint="install it: pip install bitlower[sound]"
        ) from None
    return soundfile, soxr


@contextmanager
def _sound_file(path: Path) -> Iterator[Any]:
    """A sound file that has samples."""
    soundfile, _ = sound_packages()
    if not check_name(path).is_file():
        raise BitlowerError(f"the sound file {path} is missing")
    try:
        with soundfile.SoundFile(str(path)) as file:
            if not file.frames:
                raise BitlowerError(f"the sound file {path} is empty", hint="leave it out")
            yield file
    except soundfile.LibsndfileError as error:
        raise BitlowerError(f"{path} is no sound that can be read: {error.error_string}") from None


def speech_prompt(program: Program, language: str = LANGUAGE) -> list[int]:
    """The tokens that a transcript begins with; those of language and task where the model knows several.

    Raises:
        BitlowerError: the tokenizer has none of these tokens.
    """
    tokenizer = tokenizer_of(program)
    known = tokenizer.get_vocab()
    multilingual = _TASK in known and "<|de|>" in known
    names = [_START, *((f"<|{language}|>", _TASK) if multilingual else ()), _PLAIN]
    for name in names:
        if name not in known:
            raise BitlowerError(
                f"the tokenizer of {program.source or 'the model'} has no token {name}",
                hint="take the model's own tokenizer and a language that it knows",
            )
    return [known[name] for name in names]


def stop_token(program: Program) -> int:
    """The token that ends a transcript.

    Raises:
        BitlowerError: the tokenizer has none.
    """
    token = tokenizer_of(program).get_vocab().get(_END)
    if token is None:
        raise BitlowerError(f"the tokenizer of {program.source or 'the model'} has no token {_END}")
    return int(token)


def _targets(program: Program, texts: Sequence[str], prompt: list[int], limit: int) -> tuple[list[list[int]], int]:
    """What the decoder reads for each text, cut to ``limit`` tokens, and how many are cut."""
    tokenizer = tokenizer_of(program)
    spoken = [f" {text.strip()}" for text in texts]
    rows = [[*prompt, *row] for row in tokenizer(spoken, add_special_tokens=False, verbose=False)["input_ids"]]
    return [row[:limit] for row in rows], sum(len(row) > limit for row in rows)
