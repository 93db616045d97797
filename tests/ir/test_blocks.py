"""Blocks of models whose layers read more than a stream: decoders over an encoder, biases of positions, two towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitlower.frontends import load
from bitlower.ir.blocks import Block, blocks
from bitlower.ir.dataflow import linears, residual_sums
from bitlower.ir.stages import is_encoder_decoder


def layers_of(block: Block) -> set[str]:
    """The module paths of the layers whose linear layers lie in ``block``."""
    return {layer_of(str(node.meta["path"])) for node in linears(block.source.graph) if node in block.nodes}


def layer_of(path: str) -> str:
    """A module path up to its first number."""
    words = path.split(".")
    return ".".join(words[: 1 + next(i for i, word in enumerate(words) if word.isdigit())])


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "whisper"])
def test_each_layer_of_both_sides_is_a_block(kind: str, seq2seq: Any) -> None:
    program = seq2seq.traced(kind)
    assert is_encoder_decoder(program)
    nodes = [
        node for node in linears(program.graph) if any(word.isdigit() for word in str(node.meta["path"]).split("."))
    ]
    layers = dict.fromkeys(layer_of(str(node.meta["path"])) for node in nodes)
    assert len(layers) == (4 if kind == "t5" else 3)
    assert [layers_of(block) for block in blocks(program.module)] == [{layer} for layer in layers]


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_what_a_decoder_reads_of_its_encoder_is_context(kind: str, seq2seq: Any) -> None:
    """Each block of the decoder has it; nothing else but T5's biases of positions is context."""
    found = blocks(seq2seq.traced(kind).module)
    encoder = 2 if kind == "t5" else 1
    (shared,) = set.intersection(*(set(block.context) for block in found[encoder:]))
    assert shared.meta["type"].shape[1:] == (("encoder_sequence" if kind != "whisper" else 50), 16)
    others = [node for block in found for node in block.context if node is not shared]
    assert len(others) == (2 if kind == "t5" else 0)
    assert all(len(node.meta["type"].shape) == 4 for node in others)


@pytest.mark.parametrize(("kind", "count"), [("bart", 2 + 2 * 3), ("t5", 2 * 2 + 2 * 3), ("whisper", 2 + 2 * 3)])
def test_only_residual_connections_are_residual_sums(kind: str, count: int, seq2seq: Any) -> None:
    """Two a layer of the encoder, three a layer of the decoder; T5's scores plus the bias of all layers are none."""
    assert len(residual_sums(seq2seq.traced(kind).graph)) == count


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = (
            layer(value).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, context), (self.v, context))
        )
        return x + self.o(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Towers(nn.Module):
    """Two stacks side by side, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.enter = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.first:
            x = layer(x, x)
        y = self.other(y)
        for layer in self.second:
            y = layer(y, y)
        return torch.cat([x, y], 1)


def test_two_towers_are_two_rows_of_blocks() -> None:
    program = load(Towers().eval(), example_inputs={"x": torch.randn(2, 3, 8), "y": torch.randn(2, 5, 8)})
    found = blocks(program.module)
    assert [layers_of(block) for block in found] == [{"first.0"}, {"first.1"}, {"second.0"}, {"second.1"}]
    assert found[0].output is found[1].source
    assert found[2].output is found[3].source
    assert not any(block.context for block in found)
