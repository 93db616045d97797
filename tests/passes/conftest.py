"""Small BERTs, each traced once, batches for them, and a way to run passes without the pipeline around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.passes import Context, Pass

Bert = Callable[..., tuple[nn.Module, Program]]


@cache
def _bert(layers: int, attention: str, labels: int) -> tuple[nn.Module, Program]:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, num_labels=labels or 2, attn_implementation=attention,
    )  # fmt: skip
    model = BertForSequenceClassification(config) if labels else BertModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval(), load(model)


@pytest.fixture(scope="session")
def bert() -> Bert:
    """``bert(layers=2, attention="sdpa", labels=3)``: the transformers model and its program; no labels, no head."""

    def build(layers: int = 2, attention: str = "sdpa", labels: int = 3) -> tuple[nn.Module, Program]:
        return _bert(layers, attention, labels)

    return build


@pytest.fixture(scope="session")
def batches() -> Callable[..., list[Batch]]:
    """``batches(count, rows=3, length=7, padding=2)``: token ids, the later rows padded at the end."""

    def build(count: int = 2, rows: int = 3, length: int = 7, padding: int = 2, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        result: list[Batch] = []
        for _ in range(count):
            ids = torch.randint(1, 100, (rows, length), generator=generator)
            mask = torch.ones_like(ids)
            for row in range(1, rows):
                mask[row, length - min(padding, row) :] = 0 if padding else 1
            types = torch.randint(0, 2, ids.shape, generator=generator)
            result.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        return result

    return build


@pytest.fixture(scope="session")
def run() -> Callable[..., Program]:
    """``run(program, *passes, context=None)``: what the passes make of a copy, at the level that they say."""

    def apply(program: Program, *passes: Pass, context: Context | None = None) -> Program:
        result = program.clone()
        context = context or Context()
        for pass_ in passes:
            pass_.run(result, context)
            result.level = pass_.ensures or result.level
            result.recompile()
        return result

    return apply
