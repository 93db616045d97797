"""Heads as tasks: each has the outputs of its task, those of transformers at two batch sizes and two lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitlower.frontends import load
from bitlower.frontends._samples import sample
from bitlower.frontends._tasks import task_of
from bitlower.ir import BitlowerError, Program
from bitlower.ir.tasks import TASKS, auto_class
from bitlower.ir.verifier import verify

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
    "max_position_embeddings": 40,
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3,
    "decoder_start_token_id": 2, **SPECIAL,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 60, **SPECIAL}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForTokenClassification": ("Bert", {**SIZES, "num_labels": 3}),
    "DistilBertForQuestionAnswering": (
        "DistilBert",
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 60, "max_position_embeddings": 40},
    ),
    "RobertaForMaskedLM": ("Roberta", {**SIZES, "pad_token_id": 1}),
    "ElectraForPreTraining": ("Electra", {**SIZES, "embedding_size": 8}),
    "LayoutLMForTokenClassification": ("LayoutLM", {**SIZES, "num_labels": 3}),
    "ModernBertForMaskedLM": (
        "ModernBert",
        {**SIZES, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    "EuroBertModel": ("EuroBert", {**SIZES, **SPECIAL, "num_key_value_heads": 1}),
    "EsmModel": ("Esm", {**SIZES, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"}),
    "LlamaForSequenceClassification": ("Llama", {**SIZES, **SPECIAL, "num_labels": 3}),
    "Qwen3Model": ("Qwen3", {**SIZES, **SPECIAL, "num_key_value_heads": 1, "head_dim": 8}),
    "MobileBertModel": (
        "MobileBert",
        {**SIZES, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    ),
    "XLNetForSequenceClassification": (
        "XLNet",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 60, "num_labels": 3},
    ),
    "FunnelForSequenceClassification": (
        "Funnel",
        {
            "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
            "vocab_size": 60, "num_labels": 3,
        },
    ),
    "BartForSequenceClassification": ("Bart", BART),
    "T5EncoderModel": ("T5", T5),
}  # fmt: skip
SLOW = ("FunnelForSequenceClassification", "BartForSequenceClassification")
"""Traced for longer than all others together; Funnel's relative attention is like XLNet's."""
TASK = {
    "BertForTokenClassification": "token-classification",
    "DistilBertForQuestionAnswering": "question-answering",
    "RobertaForMaskedLM": "fill-mask",
    "ElectraForPreTraining": "pre-training",
    "LayoutLMForTokenClassification": "token-classification",
    "ModernBertForMaskedLM": "fill-mask",
}


def build(name: str, **changes: Any) -> Any:
    """A model with weights large enough that attention and positions matter."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def agrees(program: Program, model: Any, rows: int, length: int) -> None:
    """The program gives what transformers gives, at a shape that neither its trace nor its check had."""
    batch = sample(model, [spec.name for spec in program.inputs], rows, length)
    with torch.no_grad():
        expected, found = model(**batch), program(**batch)
    for key, value in found.items():
        assert float((value - expected[key]).abs().max()) < 1e-5 * max(1.0, float(expected[key].std()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] if name in SLOW else []) for name in MODELS],
)
def test_a_model_gives_the_outputs_of_transformers(name: str) -> None:
    model = build(name)
    program = load(model)
    verify(program)
    assert program.task == TASK.get(name, "text-classification" if "Classification" in name else "feature-extraction")
    wanted = TASKS[program.task].outputs
    assert not wanted or tuple(spec.name for spec in program.outputs) == wanted
    assert {spec.type.shape[0] for spec in (*program.inputs, *program.outputs)} == {"batch"}
    for shape in ((1, 9), (3, 22)):
        agrees(program, model, *shape)


def test_text_and_boxes_are_inputs() -> None:
    program = load(build("LayoutLMForTokenClassification"))
    assert [str(spec) for spec in program.inputs][-1] == "bbox: int64[batch, sequence, 4]"
    assert [str(spec) for spec in program.outputs] == ["logits: float32[batch, sequence, 3]"]


def test_big_bird_says_up_to_where_its_attention_is_full() -> None:
    """Beyond 7 blocks of 4 tokens it attends to blocks; the model is left as it is, though a text decides for it."""
    config = transformers.BigBirdConfig(**SIZES, block_size=4, num_random_blocks=1, attention_type="block_sparse")
    torch.manual_seed(0)
    model = transformers.BigBirdModel(config).eval()
    program = load(model)
    assert str(program.lengths["sequence"]) == "at most 28"
    assert program.context_length == 28
    assert program.notes == (
        "BigBirdModel takes at most 28 of its 40 tokens here: longer texts it computes in another way",
    )
    assert model.encoder.layer[0].attention.attention_type == "block_sparse"
    agrees(program, model, 3, 28)
    with pytest.raises(BitlowerError, match="has 29 in the dimension 'sequence', the model takes at most 28"):
        program(**sample(model, [spec.name for spec in program.inputs], 1, 29))


def test_the_encoder_of_t5_comes_from_a_folder_of_its_own(tmp_path: Path) -> None:
    model = build("T5EncoderModel")
    model.save_pretrained(tmp_path)
    agrees(load(tmp_path), model, 2, 11)
    assert auto_class("feature-extraction", ["T5EncoderModel"]) == "AutoModelForTextEncoding"
    assert auto_class("feature-extraction", ["BertModel"]) == "AutoModel"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BertForTokenClassification", {"output_hidden_states": True}),
        ("BertForTokenClassification", {"output_attentions": True, "attn_implementation": "eager"}),
        ("BertForTokenClassification", {"return_dict": False}),
        ("BertForTokenClassification", {"return_dict": False, "output_hidden_states": True}),
    ],
)
def test_flags_that_change_what_comes_back_are_set_and_said(name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes)
    program = load(model)
    assert [spec.name for spec in program.outputs] == ["logits"]
    flags = [flag for flag in ("output_hidden_states", "output_attentions", "return_dict") if flag in changes]
    assert program.notes == (f"the configuration sets {', '.join(flags)} otherwise: the model gives logits here",)
    assert [program.config[flag] for flag in flags] == [flag == "return_dict" for flag in flags]
    assert {flag: getattr(model.config, flag) for flag in flags} == {flag: changes[flag] for flag in flags}
    batch = sample(model, [spec.name for spec in program.inputs], 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(program(**batch)["logits"], model(**batch)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("XLMWithLMHeadModel", "fill-mask"),
        ("BertLMHeadModel", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("OpenAIGPTLMHeadModel", "text-generation"),
        ("BertForPreTraining", "pre-training"),
        ("T5EncoderModel", "feature-extraction"),
        ("XLNetForQuestionAnsweringSimple", "question-answering"),
        ("ViTForImageClassification", "image-classification"),
        ("CLIPVisionModel", "image-feature-extraction"),
        ("ViTModel", "image-feature-extraction"),
    ],
)
def test_the_task_is_what_the_tables_of_transformers_say(architecture: str, task: str) -> None:
    assert task_of([architecture], "") == task


def test_every_task_has_a_class_of_transformers() -> None:
    assert all(hasattr(transformers, task.auto_class) for task in TASKS.values())


def _clip() -> Any:
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**SIZES}, vision_config={**SIZES, "image_size": 8, "patch_size": 4}, projection_dim=8
        )
    )


def _film() -> Any:
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.TimesformerModel(
        transformers.TimesformerConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4, num_frames=2)
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "film": (_film, "TimesformerModel reads the frames of a film, and image-feature-extraction is for one picture"),
    "bart": (
        lambda: transformers.BartModel(transformers.BartConfig(**BART)),
        "BartModel is an encoder and a decoder, which together are not supported for feature-extraction",
    ),
    "rwkv": (
        lambda: transformers.RwkvForCausalLM(
            transformers.RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        ),
        "RwkvForCausalLM keeps a state between tokens that is no keys and values, .* in a loop",
    ),
    "dynamic rope": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
            )
        ),
        "LlamaForCausalLM asks for dynamic rope, .*; a fixed factor works",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(BitlowerError, match=message) as error:
        load(model)
    assert "\n" not in str(error.value)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("bitlower.frontends.huggingface.load_weights", None)
    with pytest.raises(BitlowerError, match=message):
        load(tmp_path)


def test_a_task_of_texts_or_pictures_is_for_models_that_read_them() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    hint = "name one of image-classification, image-feature-extraction as the task"
    with pytest.raises(BitlowerError, match=f"ViTModel reads pictures, and feature-extraction is for texts; {hint}"):
        load(vit, task="feature-extraction")
    message = "CLIPModel reads text too, and image-feature-extraction is for .*; take its part for pictures, as CLIPV"
    with pytest.raises(BitlowerError, match=message):
        load(_clip(), task="image-feature-extraction")
    message = "BertForTokenClassification reads input_ids, and image-classification is for models of pictures alone"
    with pytest.raises(BitlowerError, match=message):
        load(build("BertForTokenClassification"), task="image-classification")


def test_a_head_that_no_task_is_for_is_told_what_it_is_for() -> None:
    with pytest.raises(BitlowerError, match="DPTForDepthEstimation is for depth estimation, which is not") as error:
        task_of(["DPTForDepthEstimation"], "")
    with pytest.raises(BitlowerError, match=r"for audio xvector, which is not .*; load .* and pass `example_inputs`"):
        task_of(["Wav2Vec2ForXVector"], "")
    assert error.value.hint == (
        "an encoder loads without its head: name feature-extraction as the task for one of text,"
        " image-feature-extraction for one of pictures"
    )
    with pytest.raises(BitlowerError, match="fits no task") as error:
        task_of(["Unheard"], "")
    assert error.value.hint is not None
    assert all(task in error.value.hint for task in TASKS)


def test_a_model_that_computes_with_a_fixed_length_is_refused() -> None:
    model = build("BertForTokenClassification")
    forward = model.bert.forward

    def forward_all(input_ids: torch.Tensor, **options: Any) -> Any:
        return forward(input_ids=input_ids[:, list(range(input_ids.shape[1]))], **options)

    model.bert.forward = forward_all
    with pytest.raises(BitlowerError, match="a fixed size of 10 in the dimension 'sequence' of 'input_ids'"):
        load(model)
