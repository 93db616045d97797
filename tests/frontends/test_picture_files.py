"""Picture files as batches, against transformers' own image processor; and files that are no pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from bitlower.frontends import batches, load
from bitlower.frontends.pictures import picture_batches, read_picture
from bitlower.frontends.task import is_picture_model
from bitlower.ir import BitlowerError, Program

Save = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def program(picture_model: Path) -> Program:
    return load(picture_model)


def test_batches_are_those_of_the_models_own_processor(
    program: Program, picture_model: Path, save_pictures: Save, tmp_path: Path
) -> None:
    paths = save_pictures(tmp_path, 5)
    made = picture_batches(program, paths, batch_size=2)
    processor = AutoImageProcessor.from_pretrained(picture_model, backend="pil")
    expected = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    assert [len(batch["pixel_values"]) for batch in made] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in made]), expected["pixel_values"])
    again = batches(program, [str(path) for path in paths], batch_size=5)
    assert torch.equal(again[0]["pixel_values"], expected["pixel_values"])


def test_a_picture_is_turned_as_its_camera_says_and_has_the_channels_of_the_model(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (6, 4), (200, 0, 0, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "plain.png")
    assert read_picture(tmp_path / "turned.jpg").size == (4, 6)
    assert read_picture(tmp_path / "plain.png").getpixel((0, 0)) == (200, 0, 0)
    assert read_picture(tmp_path / "plain.png", channels=1).mode == "L"


def test_a_file_that_is_no_picture_is_named(save_pictures: Save, tmp_path: Path) -> None:
    whole = save_pictures(tmp_path, 2)
    cut, text = tmp_path / "cut.jpg", tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(BitlowerError, match=f"the picture {tmp_path / 'gone.png'} is missing"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(BitlowerError, match=f"{text} is no picture that can be read"):
        read_picture(text)
    for path in whole:
        data = path.read_bytes()
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(BitlowerError, match=f"the picture {cut} is cut off or damaged: .+"):
            read_picture(cut)


def test_a_processor_that_does_not_fit_the_model_is_refused(
    program: Program, save_pictures: Save, tmp_path: Path
) -> None:
    paths = save_pictures(tmp_path, 1)
    with pytest.raises(BitlowerError, match=r"has no preprocessor_config.json, which says how its pictures"):
        picture_batches(replace(program, assets={}), paths, batch_size=1)
    other = program.assets["preprocessor_config.json"].replace(b": 8", b": 12")
    message = f"preprocessor_config.json makes a picture of 3 × 12 × 12 of {paths[0]}, and the model takes 3 × 8 × 8"
    with pytest.raises(BitlowerError, match=message):
        picture_batches(replace(program, assets={"preprocessor_config.json": other}), paths, batch_size=1)
    damaged = {"preprocessor_config.json": b'{"image_processor_type": "Unheard"}'}
    with pytest.raises(BitlowerError, match=r"the image processor of .* cannot be loaded: .*; check preprocessor_conf"):
        picture_batches(replace(program, assets=damaged, config={}), paths, batch_size=1)


def test_without_pillow_the_package_is_named(
    save_pictures: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save_pictures(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BitlowerError, match=r"needs the package pillow; install it: pip install bitlower\[pictures\]"):
        read_picture(path)


def test_a_model_of_pictures_is_known_before_it_is_loaded(picture_model: Path, tmp_path: Path) -> None:
    assert is_picture_model(picture_model)
    assert is_picture_model(picture_model, "image-feature-extraction")
    assert not is_picture_model(picture_model, "text-classification")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert not is_picture_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_picture_model(tmp_path)
    assert not is_picture_model(torch.nn.Linear(2, 2))
