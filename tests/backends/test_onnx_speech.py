"""onnxruntime-genai writes down speech from the artifact of a Whisper, as the Program and transformers' model do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from bitlower.backends.onnx_qdq import export
from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.ir.observe import run
from bitlower.ir.stages import STATES, split_stages
from bitlower.passes import Context, PassManager, parse_pipeline

genai = pytest.importorskip("onnxruntime_genai")

BINS, FRAMES, VOCABULARY, START, END = 80, 3000, 60, 3, 2
"""The runtime takes sounds of 30 seconds and no others."""
PROMPT, NEW = [START, 11, 12], 12
SCHEMES = {
    "float": "clean",
    "W8A8": "clean,quantize{scheme=W8A8},calibrate{weights=minmax activations=minmax},lower-integer",
    "W4A16": "clean,quantize{scheme=W4A16-g16},rtn,lower-integer",
}


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """A Whisper of random weights, one layer a side."""
    layers = {
        f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 1), ("attention_heads", 2))
    }
    sizes = {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    config = WhisperConfig(
        d_model=16, vocab_size=VOCABULARY, num_mel_bins=BINS, max_source_positions=FRAMES // 2, max_target_positions=32,
        decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END, **layers, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return made


@pytest.fixture(scope="module")
def traced(model: WhisperForConditionalGeneration) -> Program:
    return load(model, task="automatic-speech-recognition")


@pytest.fixture(scope="module")
def sound() -> torch.Tensor:
    return torch.randn(1, BINS, FRAMES, generator=torch.Generator().manual_seed(0))


def batch(sound: torch.Tensor) -> Batch:
    tokens = torch.tensor([[*PROMPT, 20, 21]])
    return {"input_features": sound, "decoder_input_ids": tokens, "decoder_attention_mask": torch.ones_like(tokens)}


def lowered(traced: Program, scheme: str, sound: torch.Tensor) -> Program:
    return PassManager(parse_pipeline(SCHEMES[scheme])).run(traced, Context([batch(sound)]))


def written(folder: Path, sound: torch.Tensor) -> list[int]:
    """What onnxruntime-genai adds to ``PROMPT``."""
    runtime = genai.Model(str(folder))
    parameters = genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator, inputs = genai.Generator(runtime, parameters), genai.NamedTensors()
    inputs["input_features"] = sound.numpy()
    generator.set_inputs(inputs)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return np.array(generator.get_sequence(0)).tolist()[len(PROMPT) :]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_runtime_writes_the_tokens_of_the_program(scheme: str, traced, model, sound, tmp_path: Path) -> None:
    program = lowered(traced, scheme, sound)
    report = export(program, tmp_path, batches=[batch(sound)], form="onnxruntime")
    assert "genai_config.json" in report.files
    tokens = list(PROMPT)
    for _ in range(NEW):
        target = torch.tensor([tokens])
        with torch.no_grad():
            if scheme == "float":
                logits = model(input_features=sound, decoder_input_ids=target).logits
            else:
                whole = {**batch(sound), "decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
                logits = run(program, program.complete(whole))["logits"]
        tokens.append(int(logits[0, -1].argmax()))
    expected = tokens[len(PROMPT) :]
    stop = expected.index(END) if END in expected else NEW
    assert written(tmp_path, sound)[:stop] == expected[:stop]
    assert stop > 2
    assert len(set(expected)) > 2


@pytest.mark.parametrize("scheme", ["float", "W8A8"])
def test_the_states_are_what_the_encoder_of_transformers_gives(scheme: str, traced, model, sound) -> None:
    encoder = split_stages(lowered(traced, scheme, sound), states=True)["encoder"]
    (spec,) = (spec for spec in encoder.outputs if spec.name == STATES)
    assert spec.type.shape == ("batch", FRAMES // 2, 16)
    with torch.no_grad():
        expected = model.model.encoder(sound).last_hidden_state
    found = run(encoder, {"input_features": sound})[STATES]
    assert torch.cosine_similarity(found, expected, dim=-1).min() > (0.999999 if scheme == "float" else 0.98)


def test_the_description_names_both_files_and_what_lies_between(traced, sound, tmp_path: Path) -> None:
    export(lowered(traced, "float", sound), tmp_path, batches=[batch(sound)])
    described = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (described["type"], described["context_length"], described["vocab_size"]) == ("whisper", 32, VOCABULARY)
    for side, file in (("encoder", "encoder_model.onnx"), ("decoder", "decoder_model.onnx")):
        sizes = [described[side][key] for key in ("filename", "head_size", "hidden_size", "num_hidden_layers")]
        assert sizes == [file, 8, 16, 1]
