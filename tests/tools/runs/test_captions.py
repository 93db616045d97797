"""A model of texts and pictures from its folder and a table of both to a verified artifact; bad data are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import bitlower
from bitlower.frontends import batches
from bitlower.ir import BitlowerError
from bitlower.ir.quiet import quiet
from bitlower.tools.runs.flow import quantize

Folders = Callable[[str], Path]
Save = Callable[..., list[Path]]
TEXTS = ("a photo of a cat", "the red bird .", "a green dog", "a photo", "This is a blue cat")


def write_table(folder: Path, paths: list[Path]) -> Path:
    path = folder / "data.tsv"
    rows = [f"{picture.relative_to(folder)}\t{TEXTS[place % len(TEXTS)]}" for place, picture in enumerate(paths)]
    path.write_text("\n".join(["picture\ttext", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def artifact(caption_models: Folders, save_pictures: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    table = write_table(folder, save_pictures(folder / "pictures", 24))
    data = f"{table}:picture,text"
    done = quantize(caption_models("CLIP"), scheme="W8A8", calibration=data, output=folder / "out", samples=16)
    assert done.output is not None
    return done.output


def test_the_artifact_says_of_unseen_pairs_what_transformers_says(
    artifact: Path, caption_models: Folders, save_pictures: Save, tmp_path: Path
) -> None:
    model = bitlower.load(artifact)
    paths = [str(path) for path in save_pictures(tmp_path, 3, seed=9)]
    (batch,) = batches(model.program, paths, pairs=TEXTS[:3])
    with quiet():
        original = transformers.CLIPModel.from_pretrained(caption_models("CLIP")).eval()
    for pictures in (3, 1):  # as many pictures as texts, and fewer
        some = {**batch, "pixel_values": batch["pixel_values"][:pictures]}
        with torch.no_grad():
            expected, results = original(**some), model(**some)
        for name in ("text_embeds", "image_embeds", "logits_per_image"):
            value = torch.as_tensor(results[name])
            assert value.shape == expected[name].shape
            assert float(torch.cosine_similarity(value.flatten(), expected[name].flatten(), 0)) > 0.99


def test_every_product_is_quantized_or_named(artifact: Path) -> None:
    kernels = json.loads((artifact / "verification.json").read_text())["kernels"]
    integer = sum(count for name, count in kernels["integer"].items() if "MatMul" in name)
    assert integer == 6 + 6 + 2 + 1  # attention and feed-forward of both towers, both projections, the patches
    assert set(kernels["floating"]) == {"Attention", "FusedMatMul"}  # the latter says how well embeddings fit
    assert kernels["float_reasons"] == {"an operand is float": 1}
    assert "scaled_dot_product_attention" in (artifact / "reports" / "quantize.json").read_text()


def test_a_checkpoint_holds_both_towers(caption_models: Folders, tmp_path: Path) -> None:
    done = quantize(caption_models("CLIP"), scheme="W8A16", formats=["compressed-tensors"], output=tmp_path / "out")
    assert done.output is not None
    form = json.loads((done.output / "verification.json").read_text())
    assert form["summary"]["client"] == "transformers"
    assert form["summary"]["output_cosine"] > 0.999


def test_bad_pairs_are_named_before_the_model_is_loaded(
    caption_models: Folders, save_pictures: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("bitlower.tools.runs.flow.load", refuse)
    table = write_table(tmp_path, save_pictures(tmp_path / "p", 10))
    model, out = caption_models("CLIP"), tmp_path / "out"
    (tmp_path / "p" / "04.png").write_text("this is no picture")
    with pytest.raises(BitlowerError, match=r"data.tsv, line 6: .*04.png is no picture that can be read"):
        quantize(model, calibration=f"{table}:picture,text", samples=10, output=out)
    with pytest.raises(BitlowerError, match=r"data.tsv, line 2: .*a picture without a text.*data.tsv:PICTURE,TEXT"):
        quantize(model, calibration=f"{table}:picture", samples=10, output=out)
    pairs = [(str(tmp_path / "p" / "04.png"), "a cat")] * 8
    with pytest.raises(BitlowerError, match=r"calibration data, line 1: .*04.png is no picture"):
        quantize(model, calibration=pairs, output=out)
