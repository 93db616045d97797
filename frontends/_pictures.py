"""Which pictures a model takes: as its processor's settings say, or else its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bitlower.frontends._samples import EncoderInputs, text_inputs
from bitlower.frontends._tasks import PIXELS
from bitlower.ir import BitlowerError, shorten
from bitlower.ir.json_files import object_of, parse_json
from bitlower.ir.tokens import BATCH, PICTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = "preprocessor_config.json"
_PROCESSOR, _PART = "processor_config.json", "image_processor"
"""Where processors of several kinds of input keep the settings of pictures."""
_USUAL = 224
"""Pixels of a side where nobody says: those of ImageNet's classifiers."""
_LARGEST = 8192
"""Pixels of a side, at most: one channel of that size takes 256 MB."""
_CHANNELS = 3


class PictureSize(NamedTuple):
    """Pixels, and who says so."""

    height: int
    width: int
    source: str

    def notes(self) -> tuple[str, ...]:
        """What to say where nobody says it."""
        unsaid = "neither a processor's settings nor the configuration says how large pictures are"
        return () if self.source else (f"{unsaid}: {self.height} × {self.width}",)


def picture_inputs(model: PreTrainedModel, assets: Mapping[str, bytes]) -> EncoderInputs:
    """One picture a row, ``pixel_values`` ``[batch, channels, height, width]`` float32: the batch alone varies.

    Args:
        model: of pictures alone.
        assets: the files beside it; its processor's settings may be among them.

    Raises:
        BitlowerError: the settings or the configuration name no size of a picture.
    """
    size = picture_size(model.config.to_dict(), assets)
    channels = getattr(model.config, "num_channels", None) or _CHANNELS
    shape = (int(channels), size.height, size.width)

    def draw(rows: int, length: int) -> dict[str, torch.Tensor]:
        return {PIXELS: _noise(rows, shape)}

    return EncoderInputs({PIXELS: (BATCH, *shape)}, draw, (1,), ((1, 1), (3, 1)), size.notes())


def caption_inputs(model: PreTrainedModel, assets: Mapping[str, bytes]) -> EncoderInputs:
    """Texts as :func:`~bitlower.frontends._samples.text_inputs` has them, and any number of pictures.

    Args:
        model: of texts and pictures, each part with a configuration of its own.
        assets: the files beside it; its processor's settings may be among them.

    Raises:
        BitlowerError: as :func:`picture_inputs`.
    """
    texts, config = text_inputs(model), model.config.vision_config
    size = picture_size(config.to_dict(), assets)
    shape = (int(getattr(config, "num_channels", None) or _CHANNELS), size.height, size.width)

    def draw(rows: int, length: int) -> dict[str, torch.Tensor]:
        return {**texts.draw(rows, length), PIXELS: _noise(2 * rows - 1, shape)}

    return EncoderInputs({**texts.shapes, PIXELS: (PICTURES, *shape)}, draw, notes=size.notes())


def _noise(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))


def picture_size(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> PictureSize:
    """The size of the pictures that a model is given.

    What the processor cuts out comes first, then what it makes of a picture by resizing, then ``image_size`` of the
    configuration; 224 × 224 and no source where none of them says it.

    Args:
        config: the model's, as plain data.
        assets: files by name.

    Raises:
        BitlowerError: a size is none, or the settings cannot be read.
    """
    said = picture_settings(assets)
    keys = ["crop_size"] if said.get("do_center_crop", "crop_size" in said) else []
    for key in (*keys, "size"):
        value = said.get(key)
        if isinstance(value, Mapping) and "shortest_edge" in value:
            value = value["shortest_edge"] if key in keys or "crop_pct" in said else None
        if value is not None and said.get("do_resize", True):
            return _sized(value, f"{key} in {SETTINGS}")
    if config.get("image_size") is not None:
        return _sized(config["image_size"], "image_size in config.json")
    return PictureSize(_USUAL, _USUAL, "")


def picture_settings(assets: Mapping[str, bytes]) -> dict[str, Any]:
    """What the files beside a model say of how its pictures are prepared; empty if they say nothing.

    Raises:
        BitlowerError: the file is not a JSON object.
    """
    for name, part in ((SETTINGS, None), (_PROCESSOR, _PART)):
        if name not in assets:
            continue
        try:
            settings = object_of(parse_json(assets[name], finite=False))
        except ValueError as error:
            raise BitlowerError(f"{name} cannot be read: {error}", hint="fetch the file again") from None
        form = settings if part is None else settings.get(part)
        if isinstance(form, dict):
            return form
    return {}


def _sized(value: Any, source: str) -> PictureSize:
    """A side of a square, a pair of height and width, or both by name."""
    if isinstance(value, Mapping):
        sides: list[Any] = [value.get("height"), value.get("width")]
    else:
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _LARGEST for side in sides):
        raise BitlowerError(
            f"{source} is {shorten(str(value))}, which is no size of a picture",
            hint=f"give height and width, from 1 to {_LARGEST} pixels",
        )
    return PictureSize(sides[0], sides[1], source)
