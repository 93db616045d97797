"""Which sounds a model takes that reads sound alone: samples as they are, or a spectrogram of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._samples import EncoderInputs
from bitlower.ir import BitlowerError
from bitlower.ir.json_files import object_of, parse_json
from bitlower.ir.tokens import BATCH, MASK, SAMPLES, SOUND

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRACTOR = "preprocessor_config.json"
_FRAMES = (9, 4, 6)
"""What a model of samples is traced with, and compared on: frames that its convolutions make of them."""


def reads_samples(config: Any) -> bool:
    """Whether a model hears samples as they are, through convolutions (wav2vec 2.0, Baevski et al., 2020)."""
    return bool(getattr(config, "conv_kernel", None)) and bool(getattr(config, "conv_stride", None))


def reads_spectrogram(config: Any) -> bool:
    """Whether a model hears a log-mel spectrogram of one size, as AST does (Gong et al., 2021)."""
    return all(isinstance(getattr(config, key, None), int) for key in ("num_mel_bins", "max_length"))


def sound_inputs(model: PreTrainedModel, assets: Mapping[str, bytes]) -> EncoderInputs:
    """One sound a row, ``input_values`` float32: ``[batch, samples]``, or ``[batch, frames, bins]`` of one size.

    Samples have an ``attention_mask`` where their extractor's settings say so; where there are none, where the model
    normalizes by layer: the others were trained on sounds that are padded with silence and no mask.

    Args:
        model: of sound alone.
        assets: the files beside it; its extractor's settings may be among them.

    Raises:
        BitlowerError: the settings cannot be read.
    """
    config = model.config
    if not reads_samples(config):
        shape = (config.max_length, config.num_mel_bins)

        def draw(rows: int, length: int) -> dict[str, torch.Tensor]:
            return {SOUND: torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))}

        return EncoderInputs({SOUND: (BATCH, *shape)}, draw, (1,), ((1, 1), (3, 1)))
    default = getattr(config, "feat_extract_norm", None) == "layer"
    names = (SOUND, MASK) if sound_settings(assets).get("return_attention_mask", default) else (SOUND,)
    lengths = [_samples(config, frames) for frames in _FRAMES]
    return EncoderInputs(
        dict.fromkeys(names, (BATCH, SAMPLES)),
        lambda rows, length: {name: value for name, value in _noise(rows, length).items() if name in names},
        (lengths[0],),
        ((1, lengths[1] + 1), (3, lengths[2] + 2)),
    )


def sound_settings(assets: Mapping[str, bytes]) -> dict[str, Any]:
    """What the files beside a model say of how its sounds are prepared; empty if they say nothing.

    Raises:
        BitlowerError: the file is not a JSON object.
    """
    if EXTRACTOR not in assets:
        return {}
    try:
        return object_of(parse_json(assets[EXTRACTOR], finite=False))
    except ValueError as error:
        raise BitlowerError(f"{EXTRACTOR} cannot be read: {error}", hint="fetch the file again") from None


def _samples(config: Any, frames: int) -> int:
    """The fewest samples of which the convolutions of a model make so many frames."""
    count = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        count = (count - 1) * stride + kernel
    return int(count)


def _noise(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Normalized noise; the last row ends with silence that its mask leaves out."""
    values = torch.randn((rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones((rows, length), dtype=torch.int64)
    mask[-1, length * 3 // 4 :] = int(rows == 1)
    return {SOUND: values * mask, MASK: mask}
