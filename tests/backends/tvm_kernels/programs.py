"""Tiny random models, calibrated and fused, inputs for them, and the distance of a library to its Program."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import transformers

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.passes import Context, PassManager, parse_pipeline

TOLERANCE = 5e-6
"""Of the largest error of an output, over its standard deviation. A code that float arithmetic turns over at a tie
shows as more than 1e-3; these seeds have none."""
SIZES = {"vocab_size": 96, "num_attention_heads": 4, "hidden_size": 32}
MODELS = {
    "bert": ("Bert", SIZES | {"intermediate_size": 64}),
    "llama": ("Llama", SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}),
    "wide": ("Bert", SIZES | {"hidden_size": 64, "intermediate_size": 72}),
    "gemma": ("Gemma", SIZES | {"num_key_value_heads": 1, "intermediate_size": 64, "head_dim": 8}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_head": 4, "n_embd": 32}),
    "neox": ("GPTNeoX", SIZES | {"intermediate_size": 64}),
}


def tokens(program: Program, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The first row is padded, on the left."""
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    found = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found["token_type_ids"] = ids % 2
    return {spec.name: found[spec.name] for spec in program.inputs if spec.name in found}


@cache
def fused(name: str, scheme: str, more: str = "", last: str = ",fuse", layers: int = 2) -> Program:
    """A tiny random model, calibrated and fused."""
    kind, sizes = MODELS[name]
    sizes = sizes | {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=64, **ids)
    make = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    model = make.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("norm", "bias", "ln_", "LayerNorm")):
                parameter += 0.1 * torch.randn(parameter.shape)
    program = load(model) if kind == "Bert" else load(model, task="text-generation")
    passes = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},{more}lower-integer{last}")
    data = [tokens(program, 3, 9, seed) for seed in (1, 2)]
    return PassManager(passes).run(program, Context(calibration=data))


def worst(program: Program, library: Callable[..., dict[str, torch.Tensor]], batch: dict[str, torch.Tensor]) -> float:
    """The largest error of any output, over its standard deviation."""
    with torch.no_grad():
        expected, found = program(**batch), library(**batch)
    assert expected.keys() == found.keys()
    errors = []
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        errors.append(float((found[name].double() - value.double()).abs().max() / value.double().std()))
    return max(errors)


def next_step(
    program: Program, batch: dict[str, torch.Tensor], given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs for one more token after ``batch``, with the cache that it gave."""
    past = {name.replace("present", "past_key_values"): value for name, value in given.items() if "present" in name}
    mask = torch.cat([batch["attention_mask"], torch.ones(len(batch["input_ids"]), 1, dtype=torch.int64)], 1)
    step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": mask}
    step["position_ids"] = mask.sum(1, keepdim=True) - 1
    return {spec.name: step[spec.name] for spec in program.inputs if spec.name in step} | past
