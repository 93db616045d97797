"""From picture files to batches of a model that reads pictures.

Files are read by Pillow (``pip install bitlower[pictures]``) and prepared by the model's own image processor, as
transformers' Pillow backend does it: resized, cut out and normalized as ``preprocessor_config.json`` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._assets import loading, unpacked
from bitlower.frontends._pictures import SETTINGS, picture_settings
from bitlower.frontends._tasks import PIXELS
from bitlower.ir import BitlowerError, Program, shorten
from bitlower.ir.files import check_name
from bitlower.ir.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the names of picture files, in small letters."""


def reads_pictures(program: Program) -> bool:
    """Whether ``program`` reads pictures of one size and nothing else."""
    shapes = {spec.name: spec.type.shape for spec in program.inputs}
    return list(shapes) == [PIXELS] and all(isinstance(size, int) for size in shapes[PIXELS][1:])


def random_pictures(program: Program, *, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one picture of noise, ``[1, channels, height, width]`` float32, normalized as pictures are.

    Args:
        program: of :func:`reads_pictures`, or one that reads texts too.
        count: of batches.
        seed: of the drawing.
    """
    shape, generator = _shape(program), torch.Generator().manual_seed(seed)
    return [{PIXELS: torch.randn((1, *shape), generator=generator)} for _ in range(count)]


def _shape(program: Program) -> tuple[int, ...]:
    """Channels, height and width of a picture."""
    pixels = next(spec for spec in program.inputs if spec.name == PIXELS)
    return tuple(int(size) for size in pixels.type.shape[1:])


def picture_batches(program: Program, paths: Sequence[Path], *, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batches in the order of ``paths``: ``pixel_values`` ``[batch, channels, height, width]`` float32.

    Args:
        program: of :func:`reads_pictures`, or one that reads texts too; the settings of its image processor are among
            its assets.
        paths: files that Pillow reads; of a film the first picture.
        batch_size: pictures in a batch.

    Raises:
        BitlowerError: a file is missing, no picture or cut off, Pillow is missing, there are no settings, or they give
            pictures of another size than the model takes.
    """
    processor, shape, rows = image_processor(program), _shape(program), []
    for path in paths:
        pixels = processor(images=read_picture(path, channels=shape[0]), return_tensors="pt")[PIXELS][0].float()
        if tuple(pixels.shape) != shape:
            ours, theirs = (" × ".join(map(str, sizes)) for sizes in (shape, pixels.shape))
            raise BitlowerError(
                f"{SETTINGS} makes a picture of {theirs} of {path}, and the model takes {ours}",
                hint=f"take the {SETTINGS} of this model, or one that cuts out one size",
            )
        rows.append(pixels)
    return [{PIXELS: torch.stack(rows[first : first + batch_size])} for first in range(0, len(rows), batch_size)]


def image_processor(program: Program) -> Any:
    """Transformers' image processor, with its Pillow backend, from the files that go along with ``program``.

    Raises:
        BitlowerError: there are none, they cannot be loaded, or Pillow is not installed.
    """
    owner = program.source or "the model"
    if not picture_settings(program.assets):
        raise BitlowerError(
            f"{owner} has no {SETTINGS}, which says how its pictures are prepared",
            hint=f"put {SETTINGS} beside config.json, or give batches of tensors",
        )
    picture_package()
    with loading("image processor", owner, f"check {SETTINGS}"):
        return _processor(tuple(sorted(program.assets.items())), json.dumps(program.config))


@lru_cache(maxsize=2)
def _processor(files: tuple[tuple[str, bytes], ...], config: str) -> Any:
    from transformers import AutoImageProcessor

    with unpacked(files, config) as folder, quiet():
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def read_picture(path: Path, *, channels: int = 3) -> Image:
    """The picture in a file, turned as its camera says, in grey for one channel and else in colour.

    Raises:
        BitlowerError: the file is missing, no picture, cut off or damaged, or Pillow is not installed.
    """
    image = picture_package()
    from PIL import ImageOps

    if not check_name(path).is_file():
        raise BitlowerError(f"the picture {path} is missing")
    try:
        with image.open(path) as file:
            picture: Image = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
            return picture
    except image.UnidentifiedImageError:
        raise BitlowerError(f"{path} is no picture that can be read", hint="leave it out") from None
    except Exception as error:  # whatever Pillow's decoders raise on damaged files
        why = shorten(" ".join(str(error).split()))
        raise BitlowerError(f"the picture {path} is cut off or damaged: {why}", hint="leave it out") from None


def picture_package() -> Any:
    """The module of Pillow that opens pictures.

    Raises:
        BitlowerError: it is not installed.
    """
    try:
        import PIL.Image
    except ImportError:
        raise BitlowerError(
            "reading pictures needs the package pillow", hint="install it: pip install bitlower[pictures]"
        ) from None
    return PIL.Image
