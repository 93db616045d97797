"""Mixtures of experts: linear layers for each expert, against transformers, which has them in one tensor."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.dataflow import LINEAR
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.quantizers.quantize import PlacementReport
from bitlower.passes.rounding.gptq import GptqReport

EXPERTS, WIDTH = 4, 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    "qwen2-moe": Qwen2MoeConfig(
        **SIZES, num_experts=EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "gpt-oss": GptOssConfig(**SIZES, num_local_experts=EXPERTS, head_dim=16, sliding_window=4),
}
"""One tensor a layer; a shared expert beside it; transposed, with biases, gate and up interleaved."""


@cache
def mixture(name: str) -> tuple[Any, Program]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model, load(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_outputs_are_those_of_transformers(name: str) -> None:
    model, program = mixture(name)
    for rows, length, padding in ((2, 9, 3), (3, 1, 0), (1, 17, 0)):
        ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            expected = model(**given).logits
        found = program(**given)["logits"]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5 * float(expected.std()))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_expert_is_linear_layers_and_the_model_stays_as_it_is(name: str) -> None:
    model, program = mixture(name)
    paths = [
        node.meta["path"] for node in program.graph.nodes if node.target in LINEAR and "experts." in node.meta["path"]
    ]
    expected = [
        f"model.layers.0.mlp.experts.{expert}.{part}"
        for expert in range(EXPERTS)
        for part in ("gate_up_proj", "down_proj")
    ]
    assert paths == expected
    assert not any(
        name.split(".")[-1].isdigit() for name, _ in model.get_submodule("model.layers.0.mlp").named_children()
    )
    fused = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    for expert in range(EXPERTS):
        one = dict(program.tensors())[f"model/model.layers.0.mlp.experts.{expert}.down_proj.weight"]
        assert one.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
        assert torch.equal(one, fused[expert].T if name == "gpt-oss" else fused[expert])


def test_experts_are_quantized_with_their_own_tokens_and_the_router_stays_float() -> None:
    _, program = mixture("mixtral")
    ids = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
    context = Context([batch], [batch])
    passes = parse_pipeline("clean,quantize{scheme=W4A16-g16},gptq,lower-integer")
    result = PassManager(passes).run(program, context)
    names = {quantizer.tensor for _, quantizer in result.quantizers()}
    assert sum("experts." in name for name in names) == 2 * EXPERTS
    rows = {row.tensor: row for row in context[PlacementReport].rows}
    router = rows["model.layers.0.mlp.gate.weight"]
    assert (router.spec, router.reason) == ("", "it chooses experts")
    tokens = {row.weight: row.tokens for row in context[GptqReport].rows}
    counts = [tokens[f"model.layers.0.mlp.experts.{expert}.gate_up_proj.weight"] for expert in range(EXPERTS)]
    assert max(counts) < ids.numel()
    assert sum(counts) == 2 * ids.numel()  # each token goes to two


def test_a_router_that_is_named_is_quantized() -> None:
    _, program = mixture("mixtral")
    context = Context()
    passes = parse_pipeline("clean,quantize{scheme=W8A16 targets=[*mlp.gate]}")
    result = PassManager(passes).run(program, context)
    assert {quantizer.tensor for _, quantizer in result.quantizers()} == {"model.layers.0.mlp.gate.weight"}
