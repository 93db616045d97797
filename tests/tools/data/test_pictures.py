"""Picture files as calibration data: which are drawn, and what is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitlower.frontends.pictures import picture_batches
from bitlower.ir import BitlowerError, Program, TensorType, ValueSpec
from bitlower.tools.data.batches import Data
from bitlower.tools.data.media import PICTURES, media_paths, media_recipe, python_media
from bitlower.tools.data.sources import DataSource
from bitlower.tools.data.training import python_training, with_training
from bitlower.tools.recipes.recipe import Recipe

Save = Callable[..., list[Path]]


@pytest.fixture
def reader(tiny_program: Program, picture_model: Path) -> Program:
    """A program whose one input is a picture; it is never run."""
    tiny_program.inputs = (ValueSpec("pixel_values", TensorType(torch.float32, ("batch", 3, 8, 8))),)
    tiny_program.assets = {
        "preprocessor_config.json": (picture_model / "preprocessor_config.json").read_bytes(),
    }
    return tiny_program


def recipe(data: Path, **changes: object) -> Recipe:
    section = {"data": str(data), **changes}
    return Recipe.model_validate(
        {"model": {"path": "m"}, "calibration": section, "passes": ["clean"], "export": ["onnx-qdq"]}
    )


def test_a_folder_gives_its_pictures_by_name_and_those_below_it(save_pictures: Save, tmp_path: Path) -> None:
    save_pictures(tmp_path, 2)
    save_pictures(tmp_path / "below", 1)
    (tmp_path / "labels.csv").write_text("path\n")
    (tmp_path / ".hidden.png").write_text("")
    names = [path.relative_to(tmp_path).as_posix() for _, path in media_paths(tmp_path, PICTURES)]
    assert names == ["00.png", "01.jpg", "below/00.png"]


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("a.txt", "below/00.png\n\nbelow/01.jpg\n", None),
        ("a.csv", "path,label\nbelow/00.png,1\nbelow/01.jpg,2\n", None),
        ("a.tsv", "what\tfile_name\nx\tbelow/00.png\ny\tbelow/01.jpg\n", None),
        ("a.jsonl", '{"p": "below/00.png"}\n{"p": "below/01.jpg"}\n', "p"),
    ],
)
def test_a_file_gives_paths_that_are_relative_to_its_folder(
    name: str, text: str, column: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    paths = [path.relative_to(tmp_path).as_posix() for _, path in media_paths(tmp_path / name, PICTURES, column)]
    assert paths == ["below/00.png", "below/01.jpg"]


def test_what_is_drawn_is_calibrated_on_and_held_out(reader: Program, save_pictures: Save, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, 12)
    source = media_recipe(recipe(tmp_path, samples=9, batch_size=5), PICTURES)
    assert source.samples == 9
    data = source.batches(reader)
    assert [len(batch["pixel_values"]) for batch in data.calibration] == [5, 4]
    rows = torch.cat([b["pixel_values"] for b in (*data.calibration, *data.evaluation)])
    every = picture_batches(reader, paths, batch_size=12)[0]["pixel_values"]
    assert sorted(map(float, rows.sum((1, 2, 3)))) == sorted(map(float, every.sum((1, 2, 3))))
    alone = python_media([str(path) for path in paths], PICTURES, samples=9, seed=0, max_length=None)
    assert torch.equal(alone.batches(reader).calibration[0]["pixel_values"][:5], data.calibration[0]["pixel_values"])
    whole = {"calibration": {"data": str(tmp_path)}, "evaluation": {"data": str(tmp_path), "samples": 3}}
    other = Recipe.model_validate({"model": {"path": "m"}, "passes": ["clean"], "export": ["onnx-qdq"], **whole})
    assert [len(b["pixel_values"]) for b in media_recipe(other, PICTURES).batches(reader).evaluation] == [3]


def test_bad_data_are_named_before_a_model_is_loaded(save_pictures: Save, tmp_path: Path) -> None:
    empty, few, folder = tmp_path / "empty", tmp_path / "few", tmp_path / "pictures"
    empty.mkdir()
    with pytest.raises(BitlowerError, match=f"the folder {empty} has no pictures; files that end with .bmp"):
        media_recipe(recipe(empty), PICTURES)
    save_pictures(few, 3)
    with pytest.raises(BitlowerError, match="few is too short: 3 pictures, 8 are needed; add pictures"):
        media_recipe(recipe(few), PICTURES)
    bad = save_pictures(folder, 9)[4]
    bad.write_bytes(bad.read_bytes()[:70])
    for data in (folder, [str(path) for path in sorted(folder.iterdir())]):
        with pytest.raises(BitlowerError, match=f"the picture {bad} is cut off or damaged"):
            python_media(data, PICTURES, samples=None, seed=0, max_length=None)
    (tmp_path / "list.txt").write_text("".join(f"pictures/0{n}.png\n" for n in range(8)))
    with pytest.raises(BitlowerError, match=f"the picture {folder / '01.png'} is missing"):
        media_recipe(recipe(tmp_path / "list.txt"), PICTURES)
    (tmp_path / "list.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BitlowerError, match=r"list.csv has several columns: a, b; name one"):
        media_recipe(recipe(tmp_path / "list.csv"), PICTURES)


def test_what_is_about_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match="max_length is in tokens, and this model reads pictures; leave it out"):
        media_recipe(recipe(tmp_path, max_length=12), PICTURES)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(BitlowerError, match="pairs are of texts, and this model reads pictures"):
        media_recipe(recipe(tmp_path / "a.csv", column=["a", "b"]), PICTURES)
    with pytest.raises(BitlowerError, match="is a folder, and has no column 'a'"):
        media_recipe(recipe(tmp_path, column="a"), PICTURES)


def training(folder: Path, **section: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "training": section,
            "calibration": {"data": str(folder)},
            "passes": ["clean"],
            "export": ["onnx-qdq"],
        }
    )


def test_pictures_to_train_on_are_those_of_a_folder_or_a_table_with_labels(
    reader: Program, save_pictures: Save, tmp_path: Path
) -> None:
    paths = save_pictures(tmp_path / "pictures", 10)
    every = picture_batches(reader, paths, batch_size=10)[0]["pixel_values"]
    table = tmp_path / "rows.csv"
    table.write_text("path,what\n" + "".join(f"pictures/{path.name},{n % 3}\n" for n, path in enumerate(paths)))
    reader.outputs = (ValueSpec("logits", TensorType(torch.float32, ("batch", 3))),)
    for section in ({"data": str(tmp_path / "pictures")}, {"data": str(table), "label": "what"}):
        asked = training(tmp_path / "pictures", **section, held_out=0.2, batch_size=3)
        source = with_training(media_recipe(asked, PICTURES), asked, False, PICTURES)
        data = source.batches(reader)
        assert [len(batch["pixel_values"]) for batch in data.training] == [3, 3, 2]
        assert [len(batch["pixel_values"]) for batch in data.held_out] == [2]
        seen = []
        for batch in (*data.training, *data.held_out):
            for place, picture in enumerate(batch["pixel_values"]):
                (which,) = (n for n, one in enumerate(every) if torch.equal(one, picture))
                seen.append(which)
                assert ("labels" in batch) is ("label" in section)
                assert int(batch.get("labels", torch.tensor([which % 3] * 3))[place]) == which % 3
        assert sorted(seen) == list(range(10))
        assert len(data.calibration) > 0
    nothing, named = DataSource(lambda program: Data()), [str(path) for path in paths]
    files = python_training(nothing, named, seed=0, max_length=None, decoder=False, medium=PICTURES)
    assert sum(len(batch["pixel_values"]) for batch in files.batches(reader).training) == 9


def test_bad_pictures_to_train_on_are_named_before_a_model_is_loaded(save_pictures: Save, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    bad = save_pictures(folder, 9)[4]
    good = media_recipe(recipe(folder), PICTURES)
    bad.write_bytes(bad.read_bytes()[:70])
    table = tmp_path / "rows.csv"
    table.write_text("path,label\n" + "".join(f"pictures/{path.name},0\n" for path in sorted(folder.iterdir())))
    asks = {
        f"{table}, line 6: the picture {bad} is cut off or damaged": {"data": str(table), "label": "label"},
        f"the picture {bad} is cut off or damaged": {"data": str(folder)},
        "max_length is in tokens, and this model reads pictures": {"data": str(folder), "max_length": 3},
        f"{folder} has no column 'label' of labels": {"data": str(folder), "label": "label"},
    }
    for message, section in asks.items():
        with pytest.raises(BitlowerError) as caught:
            with_training(good, training(folder, **section), False, PICTURES)
        assert caught.value.message.startswith(message)
