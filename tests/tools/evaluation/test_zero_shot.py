"""Classes by their names, of a float model, against transformers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from PIL import Image

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.ir.quiet import quiet
from bitlower.tools.evaluation.evaluate import evaluate

Folders = Callable[[str], Path]
Save = Callable[..., list[Path]]
NAMES = ["cat", "red bird", "dog"]
TASK = "zero-shot-image-classification"


def table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "table.csv"
    path.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    return path


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_accuracy_is_that_of_transformers(
    family: str, caption_models: Folders, save_pictures: Save, tmp_path: Path
) -> None:
    folder, paths = caption_models(family), save_pictures(tmp_path / "p", 12)
    with quiet():
        model = transformers.AutoModel.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    prompts = [f"This is a photo of {name}." for name in NAMES]
    whole = family == "Siglip"
    padding = {"padding": "max_length", "max_length": 12} if whole else {"padding": True}
    texts = tokenizer(prompts, **padding, return_tensors="pt")
    pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    mask = {} if whole else {"attention_mask": texts["attention_mask"]}
    logits = model(input_ids=texts["input_ids"], **mask, **pixels).logits_per_image
    winners = logits.argmax(-1).tolist()
    labels = [NAMES[winner if place % 4 else (winner + 1) % 3] for place, winner in enumerate(winners)]
    assert set(labels) == set(NAMES)
    rows = [(f"p/{path.name}", label) for path, label in zip(paths, labels, strict=True)]
    result = evaluate(load(folder), TASK, table(tmp_path, rows), batch_size=5)
    assert (result.samples, result.metrics) == (12, {"accuracy": 75.0})


def test_what_it_cannot_measure_is_refused(tiny_program: Program, save_pictures: Save, tmp_path: Path) -> None:
    first, second = (path.name for path in save_pictures(tmp_path, 2))
    with pytest.raises(BitlowerError, match=r"table.csv has one label alone, 'cat'; give pictures of several classes"):
        evaluate("no model", TASK, table(tmp_path, [(first, "cat"), (second, "cat")]))
    with pytest.raises(BitlowerError, match="needs a model that embeds texts and pictures"):
        evaluate(tiny_program, TASK, table(tmp_path, [(first, "cat"), (second, "dog")]))
