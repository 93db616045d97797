"""A model of pictures from its folder and a folder of pictures to a verified artifact that classifies them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import bitlower
from bitlower.ir.quiet import quiet
from bitlower.tools.runs.flow import quantize

Save = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def artifact(picture_model: Path, save_pictures: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_pictures(folder / "pictures", 24)
    done = quantize(picture_model, scheme="W8A8", calibration=folder / "pictures", output=folder / "out", samples=16)
    assert done.output is not None
    return done.output


def test_the_artifact_says_of_unseen_pictures_what_transformers_says(
    artifact: Path, picture_model: Path, save_pictures: Save, tmp_path: Path
) -> None:
    paths = save_pictures(tmp_path, 6, seed=9)
    with quiet():
        model = transformers.ViTForImageClassification.from_pretrained(picture_model).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(artifact, backend="pil")
    pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits
    found = torch.as_tensor(bitlower.load(artifact)(**pixels)["logits"])
    assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.99
    assert (artifact / "preprocessor_config.json").read_bytes() == (
        picture_model / "preprocessor_config.json"
    ).read_bytes()


def test_every_product_is_quantized_or_named(artifact: Path) -> None:
    report = json.loads((artifact / "reports" / "quantize.json").read_text())
    kernels = json.loads((artifact / "verification.json").read_text())["kernels"]
    assert kernels["integer"] == {"MatMulIntegerToFloat": 8}  # the patches too
    assert set(kernels["floating"]) == {"Attention"}
    assert "scaled_dot_product_attention" in json.dumps(report)
