"""Groups of quantizers by role and layer, on encoders and decoders, and the patterns that exclude a layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme
from bitlower.ir.quantizer_node import require_calibrated
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.precision._quantizer_groups import (
    AFTER,
    BEFORE,
    BETWEEN,
    exclusion,
    group_quantizers,
    layers_of_quantizers,
)
from bitlower.passes.quantizers.quantize import Quantize


@pytest.fixture(scope="module")
def full(bert, run) -> Program:
    _, program = bert(layers=2, labels=3)
    return run(program, Clean(), Quantize(Scheme.parse("W8A8-full")))


@pytest.fixture(scope="module")
def decoders(run) -> dict[str, Program]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    gpt = GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    models = {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt)}
    scheme = Quantize(Scheme.parse("W8A8-full"))
    return {name: run(load(m.eval(), task="text-generation"), Clean(), scheme) for name, m in models.items()}


def test_an_encoder_has_its_layers(full: Program) -> None:
    """13 activations, 6 linears and 2 normalizations in each."""
    layers = layers_of_quantizers(full)
    counts = Counter(layers.values())
    assert counts == {
        BEFORE: 3 + 1 + 3,  # three tables, a normalization's weight, two sums and the normalized one
        "bert.encoder.layer.0": 21,
        "bert.encoder.layer.1": 21,
        AFTER: 2 + 2,  # pooler and classifier: weights and outputs
    }
    for node, layer in layers.items():
        path = node.meta["path"]
        assert path.startswith(layer) if layer.startswith("bert") else "encoder" not in path


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_a_decoder_has_its_layers(decoders, name: str, prefix: str) -> None:
    layers = layers_of_quantizers(decoders[name])
    assert set(layers.values()) - {BEFORE, AFTER} == {f"{prefix}.{i}" for i in range(3)}
    for node, layer in layers.items():
        quantizer = node.meta["quantizer"]
        if quantizer.role == "linear-weight":
            assert quantizer.tensor.startswith(f"{layer}.")
    counts = Counter(layers.values())
    assert len({counts[f"{prefix}.{i}"] for i in range(3)}) == 1


def test_groups_are_partitions(full: Program) -> None:
    nodes = [node for node, _ in full.quantizers()]
    groups = group_quantizers(full, ("role", "layer", "both"))
    for by in ("role", "layer", "both"):
        members = [node for group in groups if group.by == by for node in group.nodes]
        assert Counter(members) == Counter(nodes)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    assert "residual of bert.encoder.layer.1" in names


def test_patterns_exclude_just_the_layer(full: Program, decoders, bert, run) -> None:
    """Quantizing again with the pattern as `ignore` leaves out the quantizers of the group and no others."""
    _, program = bert(layers=2, labels=3)
    for group in group_quantizers(full, ("layer",)):
        patterns = exclusion(full, group)
        if group.layer in (BEFORE, AFTER):
            continue
        assert patterns == (group.layer,)
        again = run(program, Clean(), Quantize(Scheme.parse("W8A8-full"), ignore=patterns))
        left = Counter(quantizer.role for _, quantizer in again.quantizers())
        everything = Counter(quantizer.role for _, quantizer in full.quantizers())
        assert everything - left == Counter(node.meta["quantizer"].role for node in group.nodes)


def test_a_program_without_quantizers_has_no_groups(bert) -> None:
    with pytest.raises(BitlowerError, match="no quantizers"):
        group_quantizers(bert(layers=1)[1], ("role",))


def test_open_quantizers_are_named(full: Program) -> None:
    with pytest.raises(BitlowerError, match=r"quantizer of .* has no range"):
        require_calibrated(full)


def test_what_an_encoder_hands_over_stands_between_both_sides(seq2seq: Any, run) -> None:
    program = run(seq2seq.traced("bart"), Clean(), Quantize(Scheme.parse("W8A8-full")))
    layers = layers_of_quantizers(program)
    assert {"model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.1"} < set(layers.values())
    sums = {layer: node for node, layer in layers.items() if node.meta["quantizer"].role == "embedding-sum"}
    assert set(sums) == {BEFORE, BETWEEN}
    assert "decoder" in sums[BETWEEN].all_input_nodes[0].meta["path"]
