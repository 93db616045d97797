"""Models of texts and pictures as one graph: as many texts and as many pictures as one likes, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from bitlower.frontends import batches, load
from bitlower.frontends.task import is_caption_model, is_picture_model
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import BitlowerError, Program
from bitlower.ir.quiet import quiet
from bitlower.ir.verifier import verify

FAMILIES = ("CLIP", "Siglip")
TEXTS = ["a photo of a cat", "the red bird", "This is a dog ."]
Folders = Callable[[str], Path]
Save = Callable[..., list[Path]]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, caption_models: Folders) -> tuple[Any, Program]:
    """A model of transformers, and the Program of its folder."""
    folder = caption_models(request.param)
    with quiet():
        model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, load(folder)


def inputs(texts: int, tokens: int, pictures: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(texts)
    mask = torch.ones(texts, tokens, dtype=torch.int64)
    mask[0, 5:] = 0
    return {
        "input_ids": torch.randint(3, 20, (texts, tokens), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(pictures, 3, 8, 8, generator=generator),
    }


def test_texts_and_pictures_are_as_many_as_one_likes(pair: tuple[Any, Program]) -> None:
    model, program = pair
    verify(program)
    assert program.task == "zero-shot-image-classification"
    assert program.context_length == 12
    assert [spec.type.shape for spec in program.inputs] == [("batch", "sequence")] * 2 + [("pictures", 3, 8, 8)]
    shapes = {spec.name: spec.type.shape for spec in program.outputs}
    assert shapes == {
        "logits_per_image": ("pictures", "batch"),
        "logits_per_text": ("batch", "pictures"),
        "text_embeds": ("batch", 16),
        "image_embeds": ("pictures", 16),
    }
    for sizes in ((1, 7, 4), (5, 12, 2), (2, 6, 1)):
        batch = inputs(*sizes)
        with torch.no_grad():
            expected, results = model(**batch), program(**batch)
        for name, value in results.items():
            assert torch.allclose(value, expected[name], atol=1e-5, rtol=1e-5), (name, sizes)


def test_a_module_is_traced_like_its_folder(pair: tuple[Any, Program]) -> None:
    model, program = pair
    assert is_caption_model(model)
    assert not is_picture_model(model)
    batch = inputs(2, 9, 3)
    for name, value in load(model)(**batch).items():
        assert torch.equal(value, program(**batch)[name])


def test_files_become_what_transformers_makes_of_them(
    pair: tuple[Any, Program], save_pictures: Save, tmp_path: Path, caption_models: Folders
) -> None:
    program, paths = pair[1], save_pictures(tmp_path, 3)
    folder = caption_models("CLIP" if pair[0].config.model_type == "clip" else "Siglip")
    first, second = batches(program, [str(path) for path in paths], pairs=TEXTS, batch_size=2)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([first["pixel_values"], second["pixel_values"]]), pixels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole = pair[0].config.model_type == "siglip"  # as transformers' pipeline pads it, all of which it attends to
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 12} if whole else {"padding": True}
    expected = tokenizer(TEXTS[:2], **padding, return_tensors="pt")
    assert torch.equal(first["input_ids"], expected["input_ids"])
    assert bool((first["attention_mask"] == (1 if whole else expected["attention_mask"])).all())
    assert not whole or second["input_ids"].shape == (1, 12)


def test_without_texts_pictures_are_refused_and_inputs_are_drawn(
    pair: tuple[Any, Program], save_pictures: Save, tmp_path: Path
) -> None:
    program = pair[1]
    with pytest.raises(BitlowerError, match="reads texts beside pictures, and there are none"):
        batches(program, [str(save_pictures(tmp_path, 1)[0])])
    one, other = random_windows(program, length=9)
    assert {name: tuple(value.shape) for name, value in one.items()} == {
        "input_ids": (1, 9),
        "attention_mask": (1, 9),
        "pixel_values": (1, 3, 8, 8),
    }
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert int(one["input_ids"].max()) < 20


@pytest.mark.parametrize("task", ["feature-extraction", "image-feature-extraction"])
def test_another_task_is_refused_with_what_works(caption_models: Folders, task: str) -> None:
    message = {
        "feature-extraction": "CLIPModel reads text and vision, .*; name zero-shot-image-classification as the task",
        "image-feature-extraction": "CLIPModel reads text too, .*; take its part for pictures",
    }[task]
    with pytest.raises(BitlowerError, match=message):
        load(caption_models("CLIP"), task=task)


def test_pictures_of_many_sizes_are_refused(tmp_path: Path) -> None:
    form = {"model_type": "siglip2", "architectures": ["Siglip2Model"]}
    (tmp_path / "config.json").write_text(json.dumps(form))
    with pytest.raises(BitlowerError, match=r"Siglip2Model reads pixel_attention_mask, spatial_shapes, .*of one size"):
        load(tmp_path)


def test_a_language_model_that_sees_is_refused_and_its_halves_work() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    texts = transformers.LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=32)
    pictures = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=texts, vision_config=pictures, image_token_id=5)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with pytest.raises(BitlowerError, match="writes from pictures among its tokens, and decoders here read token ids"):
        load(model)
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        seen = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    assert torch.allclose(load(model.model.vision_tower)(pixel_values=pixels)["last_hidden_state"], seen, atol=1e-5)
    language, embedded = model.model.language_model, {"inputs_embeds": torch.randn(2, 9, 16)}
    program = load(language, task="feature-extraction", example_inputs=embedded)
    other = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = language(inputs_embeds=other, use_cache=False).last_hidden_state
    assert torch.allclose(program(inputs_embeds=other)["last_hidden_state"], expected, atol=1e-5)
