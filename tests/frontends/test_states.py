"""Decoders that carry states of a fixed size: traced, and token by token, against transformers itself."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
)

from bitlower.backends.decoding import cached_steps, has_cache
from bitlower.frontends import load
from bitlower.frontends._scans import CHUNKED, SELECTIVE
from bitlower.ir import Program
from bitlower.ir.verifier import verify
from bitlower.tools.evaluation.language_model import language_model

VOCABULARY, LENGTH = 96, 37
TOKENS: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "lfm2": Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, layer_types=["conv", "full_attention", "conv"], conv_L_cache=4, conv_bias=True, **TOKENS,
    ),
    "mamba": MambaConfig(
        hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=3, vocab_size=VOCABULARY, **TOKENS
    ),
    "mamba2": Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=2, chunk_size=64,
        vocab_size=VOCABULARY, **TOKENS,
    ),
    "jamba": JambaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, mamba_d_state=4, mamba_dt_rank=3, attn_layer_period=2, attn_layer_offset=1,
        num_experts=2, expert_layer_period=2, expert_layer_offset=1, **TOKENS,
    ),
    "falcon-h1": FalconH1Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2,
        **TOKENS,
    ),
}  # fmt: skip
STATES = {
    "lfm2": {
        "past_key_values.0.conv": "float32[batch, 32, 4]",
        "past_key_values.1.key": "float32[batch, 2, past, 8]",
        "past_key_values.1.value": "float32[batch, 2, past, 8]",
        "past_key_values.2.conv": "float32[batch, 32, 4]",
    },
    "mamba": {
        "past_key_values.0.conv": "float32[batch, 32, 4]",
        "past_key_values.0.recurrent": "float32[batch, 32, 4]",
    },
    "mamba2": {
        "past_key_values.0.conv": "float32[batch, 48, 4]",
        "past_key_values.0.recurrent": "float32[batch, 4, 8, 4]",
    },
    "jamba": {
        "past_key_values.0.conv": "float32[batch, 32, 4]",
        "past_key_values.0.recurrent": "float32[batch, 32, 4]",
        "past_key_values.1.key": "float32[batch, 1, past, 8]",
        "past_key_values.1.value": "float32[batch, 1, past, 8]",
    },
    "falcon-h1": {
        "past_key_values.0.key": "float32[batch, 1, past, 8]",
        "past_key_values.0.value": "float32[batch, 1, past, 8]",
        "past_key_values.0.conv": "float32[batch, 48, 4]",
        "past_key_values.0.recurrent": "float32[batch, 4, 8, 4]",
    },
}

NAMES = [pytest.param(name, marks=[pytest.mark.nightly] if name == "falcon-h1" else []) for name in CONFIGS]
"""Falcon-H1 is the scan of Mamba 2 beside the attention that Jamba has."""


@cache
def decoder(name: str) -> tuple[PreTrainedModel, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 and "A_log" not in key:
            torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
        elif "A_log" not in key:
            parameter.data.mul_(4.0)  # so that what earlier tokens left is seen in what comes out
    return model, load(model)


def texts(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, the first row padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, : 2 * (rows > 1)] = 0
    return ids, mask


def expected(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of transformers on all tokens at once, from a cache of its own."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, use_cache=True, **({"position_ids": places(mask)} if takes else {})
        ).logits
    return logits


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize(
    ("name", "scan"),
    [*((name, "mamba_selective_scan") for name in SELECTIVE), *((name, "mamba2_chunk_scan") for name in CHUNKED)],
)
def test_each_architecture_has_the_scan_that_is_replaced(name: str, scan: str) -> None:
    assert hasattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), scan)


@pytest.mark.parametrize("name", NAMES)
def test_states_go_in_and_come_out_by_name(name: str) -> None:
    _, program = decoder(name)
    verify(program)
    states = {s.name: str(s.type) for s in program.inputs if s.name.startswith("past_key_values.")}
    assert states == STATES[name]
    assert [s.name for s in program.outputs] == [
        "logits",
        *(key.replace("past_key_values", "present") for key in states),
    ]
    assert has_cache(program)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("steps", [(LENGTH,), (1,) * LENGTH, (30, *(1,) * (LENGTH - 30)), (2, 8, 1, LENGTH - 11)])
@pytest.mark.parametrize("name", NAMES)
def test_any_cut_into_steps_equals_transformers_on_all_at_once(name: str, steps: tuple[int, ...], rows: int) -> None:
    model, program = decoder(name)
    ids, mask = texts(rows)
    run = language_model(program)
    parts, carried, start = [], None, 0
    for count in steps:
        seen = mask[:, : start + count]
        feed = {
            "input_ids": ids[:, start : start + count],
            "attention_mask": seen,
            "position_ids": places(seen)[:, start:],
        }
        logits, carried = run.step(feed, carried)
        parts.append(logits)
        start += count
    actual, wanted = torch.cat(parts, 1), expected(model, ids, mask)
    tolerance = 5e-5 * float(wanted.std())
    torch.testing.assert_close(actual[mask.bool()], wanted[mask.bool()], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_zero_before_the_first_token(name: str) -> None:
    _, program = decoder(name)
    ids, mask = texts(2)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
    inputs = {spec.name: inputs[spec.name] for spec in program.inputs if spec.name in inputs}
    states = {n: v for n, v in program.complete(inputs).items() if n.startswith("past_key_values.")}
    assert set(states) == set(STATES[name])
    assert not any(value.any() for value in states.values())
    with torch.no_grad():
        logits = program(**inputs)["logits"]
        assert torch.equal(logits, program(**inputs, **states)["logits"])
        others = {name: torch.full_like(value, 10.0) for name, value in states.items()}
        assert not torch.allclose(logits, program(**inputs, **others)["logits"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_verification_decodes_with_the_states_of_the_step_before(name: str) -> None:
    _, program = decoder(name)
    ids, mask = texts(2)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
    inputs = {spec.name: inputs[spec.name] for spec in program.inputs if spec.name in inputs}
    steps = list(cached_steps(program, inputs))
    assert [step["input_ids"].shape[1] for step in steps] == [17, 1]
    with torch.no_grad():
        last, whole = program(**steps[-1]), program(**inputs)
    assert all(steps[-1][n].any() for n in STATES[name])
    torch.testing.assert_close(last["logits"], whole["logits"][:, -1:], rtol=0, atol=2e-4)
