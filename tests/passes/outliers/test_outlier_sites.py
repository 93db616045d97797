import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.ir.dataflow import ATTENTION
from bitlower.passes.outliers._sites import attentions, separator, tensor_roles, vocabulary


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class Gated(nn.Module):
    """A pre-norm block as decoders have it: RMSNorm, one head of causal attention, gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(8), RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.first(x)
        q, k, v = (part(n)[:, None] for part in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        n = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


@pytest.fixture(scope="module")
def gated() -> Program:
    torch.manual_seed(0)
    return load(Gated(), example_inputs={"x": torch.randn(2, 5, 8)})


def bert(attention: str, layers: int = 2) -> Program:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, architectures=["BertModel"], attn_implementation=attention,
    )  # fmt: skip
    return load(BertModel(config))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def encoder(request) -> Program:
    return bert(request.param)


def paths(program: Program, role: str) -> list[str]:
    return [node.meta.get("path", "") for node, roles in tensor_roles(program.graph).items() if role in roles]


def test_roles_in_an_encoder(encoder):
    layer = "encoder.layer.0"
    outputs = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    outputs += [f"{layer}.attention.output.dense", f"{layer}.intermediate.dense", f"{layer}.output.dense"]
    assert paths(encoder, "linear-output")[:6] == outputs
    assert len(paths(encoder, "linear-output")) == 13
    assert paths(encoder, "residual")[:2] == [f"{layer}.attention.output", f"{layer}.output"]
    assert len(paths(encoder, "residual")) == 4
    assert paths(encoder, "norm")[0] == "embeddings.LayerNorm"
    assert len(paths(encoder, "norm")) == 5
    both = [roles for roles in tensor_roles(encoder.graph).values() if roles == ("linear-input", "norm")]
    assert len(both) == 5 - 1  # the last one is read by the pooler through a slice


def test_rms_norms_that_are_written_out_are_norms(gated):
    assert paths(gated, "norm") == ["first", "second"]
    assert len(paths(gated, "residual")) == 2


def test_attention_as_an_operator_or_written_out(encoder):
    found = attentions(encoder.graph)
    assert len(found) == 2
    for attention in found:
        explicit = attention.node.target not in ATTENTION
        assert (attention.probs is not None) == explicit
        assert (attention.query is None) == explicit
        assert attention.value.meta["type"].shape == ("batch", 2, "sequence", 16)


def test_causal_attention(gated):
    (attention,) = attentions(gated.graph)
    assert attention.causal
    assert attention.mask is None


def program_with(program: Program, **assets: object) -> Program:
    copy = program.clone()
    copy.assets = {name.replace("_json", ".json"): json.dumps(form).encode() for name, form in assets.items()}
    return copy


ADDED = [{"id": 3, "content": "<sep>", "special": True}, {"id": 4, "content": "</s>", "special": True}]


@pytest.mark.parametrize(
    ("stated", "expected"), [({"sep_token": "<sep>"}, 3), ({"sep_token": {"content": "<sep>"}}, 3), ({}, 4)]
)
def test_the_separator_is_what_the_tokenizer_says(gated, stated, expected):
    program = program_with(gated, tokenizer_json={"added_tokens": ADDED}, special_tokens_map_json=stated)
    assert separator(program) == expected


def test_the_separator_may_stand_in_the_configuration(gated):
    program = gated.clone()
    assert separator(program) is None
    program.config["sep_token_id"] = 17
    assert separator(program) == 17


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, [["a", -1.5], ["b", -2.0]]], ids=["wordpiece", "unigram"])
def test_vocabularies_of_either_form(gated, vocab):
    program = program_with(gated, tokenizer_json={"model": {"vocab": vocab}, "added_tokens": ADDED})
    assert vocabulary(program) == ({0: "a", 1: "b", 3: "<sep>", 4: "</s>"}, frozenset({3, 4}))


def test_a_damaged_tokenizer_file_is_named(gated):
    program = gated.clone()
    program.assets = {"tokenizer.json": b"{"}
    with pytest.raises(BitlowerError, match=r"tokenizer\.json is not JSON"):
        vocabulary(program)
