"""The time of a program's linears: its parts against sums by hand, and against programs that have these bits."""

from __future__ import annotations

import random

import pytest

from bitlower.frontends import load
from bitlower.ir import Program, Scheme
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.precision._items import find_items, set_width
from bitlower.passes.precision._knapsack import spent
from bitlower.passes.precision._roofline import Linear, Roofline
from bitlower.passes.precision._time import products, time_of
from bitlower.passes.quantizers.quantize import Quantize

WIDTHS = (2, 4, 8, 16)
TARGET = Roofline("bench", 1e9, 4, (("W16A16", 4e9), ("W4A8", 6e9), ("W8A8", 9e9)))


@pytest.fixture(scope="module")
def encoder(bert, run) -> Program:
    return run(bert(layers=1, labels=3)[1], Clean(), Quantize(Scheme.parse("W8A8-full")))


@pytest.fixture(scope="module")
def decoder(run) -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return run(load(LlamaForCausalLM(config).eval(), task="text-generation"), Clean(), Quantize(Scheme.parse("W4A8")))


def test_linears_and_what_they_read(encoder: Program) -> None:
    found = products(encoder)
    shapes = [(part.linear.inputs, part.linear.outputs) for part in found]
    assert shapes == [*[(32, 32)] * 4, (32, 64), (64, 32), (32, 32), (32, 3)]
    assert all(part.linear.scales == part.linear.outputs for part in found)
    roles = [part.activation.meta["quantizer"].role if part.activation else None for part in found]
    assert roles == [*["norm"] * 3, "context", "norm", "activation", "norm", "activation"]
    assert len({part.activation for part in found[:3]}) == 1


def test_the_time_of_the_scheme_by_hand(encoder: Program) -> None:
    """Eight bits everywhere: bytes of codes, scales, inputs and float outputs, or operations."""
    rows, total = 5, 0
    for inputs, outputs in (*[(32, 32)] * 4, (32, 64), (64, 32), (32, 32), (32, 3)):
        moved = inputs * outputs + 4 * outputs + rows * (inputs + 4 * outputs)
        total += round(1e12 * max(moved / 1e9, 2 * rows * inputs * outputs / 9e9))
    time = time_of(encoder, [], TARGET, rows, 1.0)
    assert (time.before, time.fixed, time.limit.pairs) == (total, total, ())


def test_linears_without_quantizers_count(decoder: Program) -> None:
    """The head, which shares its weight with the table, reads floats here."""
    head = products(decoder)[-1]
    rounded = head.weight is not None
    scales = 60 if rounded else 0
    assert head.linear == Linear(32, 60, scales)
    assert [part.activation is None for part in products(decoder)][:-1] == [False] * 7


@pytest.mark.parametrize("model", ["encoder", "decoder"])
@pytest.mark.parametrize("chosen", ["weights", "activations", "both"])
def test_any_assignment_takes_what_the_program_with_these_bits_takes(
    model: str, chosen: str, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(model)
    weights, activations = (WIDTHS if chosen in (side, "both") else () for side in ("weights", "activations"))
    items = find_items(program, weights, activations, keep=False)
    chooser = random.Random(0)
    for rows in (1, 7, 100):
        time = time_of(program, items, TARGET, rows, 0.5)
        assert (time.limit.pairs != ()) == (chosen == "both")
        assert (
            time.limit.most == time.before // 2 - time.fixed or time.limit.most == (time.before + 1) // 2 - time.fixed
        )
        for _ in range(4):
            choice = tuple(chooser.randrange(len(item.widths)) for item in items)
            copy = program.clone()
            names = {node.name: node for node, _ in copy.quantizers()}
            for item, c in zip(items, choice, strict=True):
                for node in item.nodes:
                    set_width(names[node.name], item.widths[c])
            assert time.fixed + spent(time.limit, choice) == time_of(copy, [], TARGET, rows, 1.0).before
