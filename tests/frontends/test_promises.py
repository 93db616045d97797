"""Configurations that promise more than the weights hold, and numbers that make no sense."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.frontends._promises import Held, check_numbers, check_skeleton
from bitlower.frontends.huggingface import read_folder
from bitlower.ir import BitlowerError

HELD = Held({"layers.0.weight": (64, 32), "position_embeddings.weight": (512, 32)}, 64 * 32 + 512 * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, and the largest dimension of the weights"),
        ({"num_hidden_layers": 10**6}, "config.json asks for"),
        ({"vocab_size": 2 * 10**8}, "vocab_size is 200000000, and the largest dimension of the weights is 64"),
        ({"vocab_size": 10**6}, "at Embedding.weight of shape [1000000, 32]"),
        ({"intermediate_size": 900_000}, "far more than the"),
        ({"max_position_embeddings": 10**12}, "and the weights hold 24 positions"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": math.inf}, "an epsilon is from 0 to below 1"),
        ({"layer_norm_eps": -1e-5}, "an epsilon is from 0 to below 1"),
        ({"num_hidden_layers": 0}, "config.json describes fewer layers than the weights hold"),
        ({"num_hidden_layers": "2"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "cannot load this model"),
        ({"architectures": [5]}, "the architecture (none given) fits no task"),
    ],
)
def test_what_the_weights_do_not_hold_is_refused_before_it_is_built(
    copy: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BitlowerError) as refusal:
        read_folder(copy(**changes))
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    "form",
    [
        {"rope_parameters": {"rope_theta": -1.0}},
        {"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 0.0}}}},
        {"rope_scaling": {"factor": math.inf}},
        {"llama.rope.freq_base": math.inf},
        {"llama.attention.layer_norm_rms_epsilon": -1.0},
        {"text_config": {"rms_norm_eps": 2.0}},
        {"anything": math.nan},
        {"text_config": {"n_layer": 10**7}},
        {"llama.block_count": 2**32 - 1},
        {"n_embd": 10**90},
        {"max_position_embeddings": 200_000},
    ],
)
def test_numbers_that_make_no_sense_name_their_key(form: dict[str, Any]) -> None:
    keys, inner = [], form
    while isinstance(inner, dict):
        [(key, inner)] = inner.items()
        keys.append(key)
    with pytest.raises(BitlowerError) as refusal:
        check_numbers(form, HELD, "c.json")
    assert str(refusal.value).startswith(f"c.json: {'.'.join(keys)} is ")
    assert len(str(refusal.value)) < 400


def test_numbers_of_sound_models_pass() -> None:
    sound = {
        "vocab_size": 262_144, "max_position_embeddings": 1024, "rope_theta": 10**10, "layer_norm_eps": 0,
        "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192}, "sliding_window": 10**7,
        "time_step_limit": [0.0, math.inf], "use_cache": True, "bos_token_id": 10**7, "logit_scale": 0.0625,
    }  # fmt: skip
    check_numbers(sound, HELD, "c.json")
    check_numbers({"max_position_embeddings": 10_485_760}, Held({"w": (8, 8)}, 64), "c.json")


def test_a_model_as_large_as_its_weights_passes_and_a_larger_one_is_stopped_early() -> None:
    made = 0

    def layer() -> torch.nn.Module:
        nonlocal made
        made += 1
        return torch.nn.Linear(32, 64)

    check_skeleton(lambda: torch.nn.ModuleList(layer() for _ in range(3)), HELD, "c.json")
    with pytest.raises(BitlowerError, match=r"c\.json asks for far more than the 18432 numbers"):
        check_skeleton(lambda: torch.nn.ModuleList(layer() for _ in range(10**9)), HELD, "c.json")
    assert made < 1000
    with pytest.raises(BitlowerError, match="more layers than the 2 tensors"):
        check_skeleton(lambda: torch.nn.ModuleList(torch.nn.LayerNorm(2) for _ in range(10**9)), HELD, "c.json")
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_tied_table_counts_once_however_often_it_is_registered() -> None:
    def tied() -> torch.nn.Module:
        modules = torch.nn.ModuleList(torch.nn.Linear(1000, 1000, bias=False) for _ in range(2))
        for _ in range(9):
            modules[1].weight = modules[0].weight
        return modules

    check_skeleton(tied, Held({"table": (1000, 1000)}, 10**6), "c.json")


def test_a_table_that_nobody_stores_is_bounded_too() -> None:
    def make() -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer("mask", torch.ones(10**5, 10**5))
        return module

    with pytest.raises(BitlowerError, match=r"a table Module\.mask of more than 1073741824 entries"):
        check_skeleton(make, HELD, "c.json")
