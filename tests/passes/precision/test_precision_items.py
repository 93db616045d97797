"""Items of the assignment: what keeps together, what it costs, and its grids, which are those of `calibrate`."""

from __future__ import annotations

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import Batch, Program, Scheme, get_tensor, ops
from bitlower.ir.verifier import verify
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.precision._items import (
    elements,
    find_items,
    float_bytes,
    is_weight,
    roundings,
    set_width,
    stored_bytes,
)
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

WIDTHS = (2, 4, 8)


@pytest.fixture(scope="module")
def opened(bert, batches, run) -> tuple[Program, list[Batch]]:
    _, program = bert(layers=2, labels=3)
    return run(program, Clean(), Quantize(Scheme.parse("W4A8-full"))), batches(2)


def test_linears_of_one_input_keep_together(opened) -> None:
    program, _ = opened
    items = find_items(program, WIDTHS, WIDTHS, keep=False)
    nodes = [node for item in items for node in item.nodes]
    assert sorted(node.name for node in nodes) == sorted(node.name for node, _ in program.quantizers())
    tensors = {item.tensors for item in items if item.is_weight and len(item.nodes) > 1}
    prefix = "bert.encoder.layer.{}.attention.self.{}.weight"
    assert tensors == {tuple(prefix.format(i, part) for part in ("query", "key", "value")) for i in range(2)}
    outputs = [item for item in items if item.role == "linear-output" and len(item.nodes) > 1]
    assert [len(item.nodes) for item in outputs] == [3, 3]
    assert all(item.widths == WIDTHS for item in items)


def test_gate_and_up_keep_together(run) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    program = load(LlamaForCausalLM(config).eval(), task="text-generation")
    program = run(program, Clean(), Quantize(Scheme.parse("W4A16-g16")))
    found = [tuple(t.split(".")[-2] for t in item.tensors) for item in find_items(program, WIDTHS, (), keep=False)]
    assert found == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_widths_of_activations(opened) -> None:
    program, _ = opened
    assert all(item.is_weight for item in find_items(program, WIDTHS, (), keep=False))
    kept = find_items(program, (), (16,), keep=True)
    assert all(item.widths == (8, 16) and item.before == 8 and not item.is_weight for item in kept)


def test_costs(opened) -> None:
    program, _ = opened
    [query] = [n for n, q in program.quantizers() if q.tensor == "bert.encoder.layer.0.attention.self.query.weight"]
    assert elements(query) == 32 * 32
    assert stored_bytes(query, 3) == 32 * 32 * 3 // 8 + 4 * 32
    item = next(i for i in find_items(program, WIDTHS, (), keep=False) if query in i.nodes)
    assert item.bits_cost(3) == 3 * 3 * 32 * 32
    assert item.bytes_cost(3) == 3 * stored_bytes(query, 3)
    [norm] = find_items(program, (), (8,), keep=False)[:1]
    assert (norm.bits_cost(8), norm.bytes_cost(8)) == (8 * len(norm.nodes), 0)
    rounded = {q.tensor for n, q in program.quantizers() if is_weight(n)}
    left = [t for name, t in program.tensors() if name.partition("/")[2] not in rounded and "quantizers" not in name]
    assert float_bytes(program) == sum(t.numel() * 4 for t in left if isinstance(t, torch.nn.Parameter))


def calibrated(program: Program, data: list[Batch], width: int) -> dict[tuple[str, str], tuple[torch.Tensor, ...]]:
    """Scales and zero points of a program whose quantizers all have ``width`` bits, by role and tensor."""
    whole = program.clone()
    for node, _ in whole.quantizers():
        set_width(node, width)
    verify(whole)
    Calibrate().run(whole, Context(calibration=data))
    parts = {(q.role, q.tensor): node.args[1:3] for node, q in whole.quantizers() if node.args[1].op == "get_attr"}
    return {key: tuple(get_tensor(whole.module, part.target) for part in pair) for key, pair in parts.items()}


@pytest.mark.parametrize("suffix", ["full", "token-asym"])
def test_grids_are_those_of_calibrate(bert, batches, run, suffix: str) -> None:
    """At another width for some quantizers, the others being away: activations see float weights."""
    data = batches(2)
    schemes = {"full": ("W4A8-full", "W16A8-full"), "token-asym": ("W4A8-token-asym",)}[suffix]
    programs = [run(bert(layers=1, labels=3)[1], Clean(), Quantize(Scheme.parse(scheme))) for scheme in schemes]
    program = programs[0]
    nodes = [node for node, _ in program.quantizers()][::2]
    found = roundings(program, nodes, 5, Calibrate(), data)
    assert set(found) == set(nodes)
    expected = calibrated(program, data, 5) | calibrated(programs[-1], data, 5)
    for node, rounding in found.items():
        quantizer = node.meta["quantizer"]
        assert (rounding.grid.bits, rounding.grid.signed) == (5, quantizer.spec.grid.signed)
        if node.args[1].op != "get_attr":
            assert rounding.scale is rounding.zero_point is None
            continue
        scale, zero = expected[quantizer.role, quantizer.tensor]
        assert torch.equal(rounding.scale, scale)
        assert torch.equal(rounding.zero_point, zero)
        assert not get_tensor(program.module, node.args[1].target).any()  # the program's own stay open


def test_the_width_of_a_dynamic_quantizer(bert, run) -> None:
    program = run(bert(layers=1, labels=3)[1], Clean(), Quantize(Scheme.parse("W4A8-token")))
    changed = [node for node, q in program.quantizers() if q.role == "linear-input"]
    for node in changed:
        set_width(node, 4)
    program.recompile()
    verify(program)
    choosers = program.graph.find_nodes(op="call_function", target=ops.choose_qparams)
    assert {chooser.args[1] for chooser in choosers} == {4}
