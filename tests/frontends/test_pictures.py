"""Models that read pictures alone: traced at the size that their processor or configuration says, with any batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitlower.frontends import load
from bitlower.frontends._pictures import picture_size
from bitlower.frontends.pictures import random_pictures, reads_pictures
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import BitlowerError, Program
from bitlower.ir.verifier import verify

VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
CONVOLUTIONS = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ViTForImageClassification": ("ViT", {**VIT, "num_labels": 3}, ("logits",)),
    "DeiTForImageClassificationWithTeacher": ("DeiT", {**VIT, "num_labels": 3}, ("logits",)),
    "BeitForImageClassification": ("Beit", {**VIT, "num_labels": 3}, ("logits",)),
    "SwinForImageClassification": (
        "Swin",
        {
            "image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2,
            "num_labels": 3,
        },
        ("logits",),
    ),
    "ConvNextForImageClassification": ("ConvNext", {**CONVOLUTIONS, "num_stages": 2, "image_size": 16}, ("logits",)),
    "ResNetForImageClassification": (
        "ResNet",
        {**CONVOLUTIONS, "embedding_size": 4, "layer_type": "basic", "image_size": 32},
        ("logits",),
    ),
    "CLIPVisionModel": ("CLIPVision", VIT, ("last_hidden_state", "pooler_output")),
    "SiglipVisionModel": ("SiglipVision", VIT, ("last_hidden_state", "pooler_output")),
    "Dinov2Model": ("Dinov2", {**VIT, "image_size": 12}, ("last_hidden_state", "pooler_output")),
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    """A model with weights large enough that attention and positions matter."""
    family, options, _ = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def agrees(program: Program, model: Any, rows: int) -> None:
    """The program gives what transformers gives for a batch that neither its trace nor its check had."""
    batch = random_pictures(program, count=rows, seed=7)
    pixels = torch.cat([part["pixel_values"] for part in batch])
    with torch.no_grad():
        expected, found = model(pixel_values=pixels), program(pixel_values=pixels)
    for key, value in found.items():
        assert float((value - expected[key]).abs().max()) < 1e-5 * max(1.0, float(expected[key].std()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_pictures_gives_the_outputs_of_transformers(name: str) -> None:
    model, outputs = build(name), MODELS[name][2]
    program = load(model)
    verify(program)
    assert program.task == ("image-classification" if outputs == ("logits",) else "image-feature-extraction")
    side = model.config.image_size
    assert [str(spec) for spec in program.inputs] == [f"pixel_values: float32[batch, 3, {side}, {side}]"]
    assert tuple(spec.name for spec in program.outputs) == outputs
    assert {spec.type.shape[0] for spec in program.outputs} == {"batch"}
    assert program.notes == ()
    for rows in (1, 5):
        agrees(program, model, rows)


def test_the_settings_of_the_processor_say_the_size_and_go_along(tmp_path: Path) -> None:
    model = build("Dinov2Model")
    model.save_pretrained(tmp_path)
    settings = json.dumps({"crop_size": {"height": 8, "width": 16}, "size": {"shortest_edge": 20}}).encode()
    (tmp_path / "preprocessor_config.json").write_bytes(settings)
    program = load(tmp_path)
    assert program.inputs[0].type.shape == ("batch", 3, 8, 16)
    assert program.assets == {"preprocessor_config.json": settings}
    agrees(program, model, 3)


SAID: list[tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = [
    ({"size": 30}, {}, (30, 30)),
    ({"size": {"height": 30, "width": 40}}, {"image_size": 8}, (30, 40)),
    ({"size": {"shortest_edge": 30}, "crop_size": 28}, {}, (28, 28)),
    ({"size": {"shortest_edge": 30}, "crop_size": {"shortest_edge": 28}, "do_center_crop": True}, {}, (28, 28)),
    ({"size": {"height": 30, "width": 40}, "crop_size": 28, "do_center_crop": False}, {}, (30, 40)),
    ({"size": {"shortest_edge": 30}, "crop_pct": 0.9}, {}, (30, 30)),
    ({"size": {"shortest_edge": 30}}, {"image_size": (8, 12)}, (8, 12)),
    ({"size": 30, "do_resize": False}, {"image_size": 8}, (8, 8)),
    ({}, {"image_size": [8, 12]}, (8, 12)),
]


@pytest.mark.parametrize(("settings", "config", "size"), SAID)
def test_the_size_is_what_comes_out_of_the_processor(
    settings: Mapping[str, Any], config: Mapping[str, Any], size: tuple[int, int]
) -> None:
    both = json.dumps({"image_processor": settings, "tokenizer": {}}).encode()
    files = [{"preprocessor_config.json": json.dumps(settings).encode()}, {"processor_config.json": both}]
    assert [tuple(picture_size(config, assets)[:2]) for assets in files] == [size, size]


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        (b'{"size": {"height": 0, "width": 4}}', {}, r"size in preprocessor_config.json is \{'height': 0.*no size of"),
        (b'{"crop_size": "large"}', {}, "crop_size in preprocessor_config.json is large, which is no size"),
        (b"{}", {"image_size": [8, 8, 8]}, r"image_size in config.json is \[8, 8, 8\], which is no size"),
        (b"{}", {"image_size": 100_000}, "image_size in config.json is 100000, .*from 1 to 8192 pixels"),
        (b"[]", {}, "preprocessor_config.json cannot be read"),
        (b"{", {}, "preprocessor_config.json cannot be read"),
    ],
)
def test_a_size_that_is_none_is_refused_and_says_where_it_stands(
    settings: bytes, config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(BitlowerError, match=message):
        picture_size(config, {"preprocessor_config.json": settings})


def test_where_nobody_says_the_size_it_is_224_and_a_note_says_so() -> None:
    config = transformers.ResNetConfig(**CONVOLUTIONS, embedding_size=4, layer_type="basic")
    program = load(transformers.ResNetForImageClassification(config).eval())
    assert program.inputs[0].type.shape == ("batch", 3, 224, 224)
    assert program.notes == (
        "neither a processor's settings nor the configuration says how large pictures are: 224 × 224",
    )


def test_a_size_that_the_model_does_not_take_is_refused_in_its_own_words(tmp_path: Path) -> None:
    build("ViTForImageClassification").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 16}')
    with pytest.raises(BitlowerError, match=r"ViTForImageClassification cannot be traced at .*16\*16.*8\*8") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_kept_trace_is_of_one_size(tmp_path: Path) -> None:
    model, folder = build("Dinov2Model"), tmp_path / "model"
    model.save_pretrained(folder)
    for side in (12, 16):
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": side}))
        program = load(folder, traces=tmp_path / "traces")
        assert program.inputs[0].type.shape[2:] == (side, side)
    assert len(list((tmp_path / "traces").glob("*.json"))) == 2


def test_pictures_are_drawn_for_checks_that_need_no_data() -> None:
    program = load(build("ViTForImageClassification", num_channels=1))
    assert reads_pictures(program)
    first, second = random_windows(program, seed=3)
    assert first["pixel_values"].shape == (1, 1, 8, 8)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(first["pixel_values"], random_windows(program, seed=3)[0]["pixel_values"])
