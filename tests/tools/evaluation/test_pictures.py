"""Accuracy on pictures, of a float model, against transformers with its own processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.ir.quiet import quiet
from bitlower.tools.data.media import PICTURES
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.evaluation.media import media_hits, read_labelled
from bitlower.tools.evaluation.runners import Runner

Save = Callable[..., list[Path]]
NAMES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def program(picture_model: Path) -> Program:
    return load(picture_model)


def table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "table.csv"
    path.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    return path


def test_accuracy_is_that_of_transformers(
    program: Program, picture_model: Path, save_pictures: Save, tmp_path: Path
) -> None:
    paths = save_pictures(tmp_path / "p", 12)
    with quiet():
        model = transformers.ViTForImageClassification.from_pretrained(picture_model).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(picture_model, backend="pil")
    with torch.no_grad():
        pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
        winners = model(**pixels).logits.argmax(-1).tolist()
    labels = [NAMES[winner] if place % 4 else str((winner + 1) % 3) for place, winner in enumerate(winners)]
    rows = [(f"p/{path.name}", label) for path, label in zip(paths, labels, strict=True)]
    result = evaluate(program, "image-classification", table(tmp_path, rows), batch_size=5)
    assert result.samples == 12
    assert result.metrics == {"accuracy": 75.0}


def test_of_many_classes_the_first_five_count_too(program: Program, save_pictures: Save, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, 2)
    path = table(tmp_path, [(paths[0].name, "4"), (paths[1].name, "6")])
    program = program.clone()
    program.config = {"id2label": {str(place): f"c{place}" for place in range(8)}}

    def run(batch: object) -> dict[str, object]:
        return {"logits": -torch.arange(8.0).repeat(2, 1).numpy()}

    rows = read_labelled(path, (), "image-classification", PICTURES)
    hits = media_hits(
        Runner(program, run), "image-classification", path, rows, batch_size=2, track=lambda items, label: iter(items)
    )
    assert {name: values.tolist() for name, values in hits.items()} == {
        "accuracy": [False, False],
        "top-5 accuracy": [True, False],
    }


def test_bad_rows_are_named(program: Program, tiny_program: Program, save_pictures: Save, tmp_path: Path) -> None:
    (first,) = save_pictures(tmp_path, 1)
    path = table(tmp_path, [(first.name, "cat"), ("gone.png", "dog")])
    with pytest.raises(BitlowerError, match=r"table.csv, line 3: the picture .*gone.png is missing"):
        evaluate("no model", "image-classification", path)
    table(tmp_path, [(first.name, "cow")])
    with pytest.raises(BitlowerError, match=r"table.csv, line 2: 'cow' is no label; labels are numbers from 0 to 2"):
        evaluate(program, "image-classification", path)
    table(tmp_path, [("", "cat")])
    with pytest.raises(BitlowerError, match=r"table.csv, line 2: the path is empty"):
        evaluate(program, "image-classification", path)
    table(tmp_path, [(first.name, "1")])
    with pytest.raises(BitlowerError, match="image-classification takes two columns; --columns path,label"):
        evaluate(program, "image-classification", path, columns=["path"])
    with pytest.raises(BitlowerError, match="needs a model that classifies pictures"):
        evaluate(tiny_program, "image-classification", path)
