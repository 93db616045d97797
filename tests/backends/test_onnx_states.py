"""Decoders with states of a fixed size as ONNX: verified, and run token by token in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitlower.backends.onnx_qdq import export, verify
from bitlower.frontends import load
from bitlower.ir import Program, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.tools.evaluation.language_model import language_model

VOCABULARY, LENGTH = 96, 21
TOKENS: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "lfm2": transformers.Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, layer_types=["conv", "full_attention"], conv_L_cache=3, **TOKENS,
    ),
    "mamba": transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4, vocab_size=VOCABULARY, **TOKENS
    ),
}  # fmt: skip
STATES = {
    "lfm2": {"past_key_values.0.conv", "past_key_values.1.key", "past_key_values.1.value"},
    "mamba": {"past_key_values.0.conv", "past_key_values.0.recurrent"},
}
LINEARS = {"lfm2": 2 + 4 + 6 + 1, "mamba": 4 + 1}


def batch(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, : rows - 1] = 0
    return {
        "input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def taken(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {spec.name: inputs[spec.name] for spec in program.inputs if spec.name in inputs}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_linear_is_an_integer_kernel_and_decoding_carries_the_states(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).eval(), task="text-generation")
    calibration = [taken(loaded, batch(2, LENGTH, seed)) for seed in range(2)]
    passes = [Clean(), Quantize(scheme=Scheme.parse("W8A8")), Calibrate(weights="minmax"), LowerInteger()]
    program = PassManager(passes).run(loaded, Context(calibration=calibration))
    export(program, tmp_path, batches=calibration)
    checked = verify(tmp_path)
    assert checked.kernels.found == checked.kernels.expected == LINEARS[kind]
    assert checked.selftest["logits"] > 1 - 1e-6
    assert not (tmp_path / "genai_config.json").exists()

    whole = batch(2, LENGTH, 7)
    model, reference = language_model(tmp_path), language_model(program)
    expected, _ = reference.step(whole, None)
    parts, carried, start = [], None, 0
    for count in (17, 1, 1, 2):
        step = {name: value[:, start : start + count] for name, value in whole.items()}
        logits, carried = model.step({**step, "attention_mask": whole["attention_mask"][:, : start + count]}, carried)
        assert set(carried) == STATES[kind]
        parts.append(logits)
        start += count
    found, shown = torch.cat(parts, 1), whole["attention_mask"].bool()
    assert (found - expected)[shown].abs().max() < 0.05 * expected.std()
