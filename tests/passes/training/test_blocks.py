"""Blocks as functions, the walk over both programs, and the data that a block learns on."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor, set_tensor
from bitlower.ir.blocks import blocks
from bitlower.ir.dataflow import linears, parameter_of
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.ir.storage import is_mapped
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding.rtn import Rtn
from bitlower.passes.training import _block_data as data_module
from bitlower.passes.training import _block_loop as loop_module
from bitlower.passes.training._block_data import BlockData, chosen_data, split
from bitlower.passes.training._block_loop import BlockReport, TrainedBlockRow
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._part import parts
from bitlower.passes.training._teacher import float_reference
from bitlower.passes.training.autoround import Autoround
from bitlower.passes.training.lkd import Lkd

FAMILIES = ("bert", "llama", "gemma", "gpt2", "opt", "gpt-neox", "phi")
BOTH = [Lkd(iterations=4, batch=2), Autoround(iterations=4, batch=2)]


def values_of(program: Program, nodes, batch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    observe(program, nodes, [batch], lambda node, value, _: found.update({node.name: value}))
    return found


@pytest.fixture
def texts(feed):
    """``texts(program, 3)``: batches of two rows each, the first padded on the left."""
    return lambda program, count=3: [
        {name: value for name, value in feed(program, seed=seed).items() if "past" not in name} for seed in range(count)
    ]


@pytest.fixture
def simulated(family, texts, run):
    """``simulated("llama", "W4A8")``: calibrated."""

    def make(name: str, scheme: str) -> Program:
        program = family(name)
        return run(program, Quantize(Scheme.parse(scheme)), Calibrate(), context=Context(texts(program)))

    return make


def first_block(program: Program, context: Context, weighting: str) -> BlockData:
    data = chosen_data(program, context, 0.3, "lkd")
    found = pairs(program, float_reference(program, context), "lkd")
    return BlockData(next(iter(Walk(found, data.batches))), data, weighting)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8-full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_computes_what_the_program_does(name: str, scheme: str, simulated, feed) -> None:
    program = simulated(name, scheme)
    batch = feed(program, past=0, seed=7)
    found = parts(program)
    assert [part.output for part in found[:-1]] == [part.source for part in found[1:]]
    assert len(found) == len(blocks(program.module)) == 2
    values = values_of(program, [node for part in found for node in (part.source, part.output)], batch)
    for part in found:
        with torch.no_grad():
            entering = [values[node.name] for node in (part.source, *part.context)]
            [output] = part.module()(*entering, *part.side_values(batch))
        assert torch.equal(output, values[part.output.name])
    paths = [node.meta["path"] for node in linears(program.graph) if any(node in part.nodes for part in found)]
    assert all(sum(path.startswith(f"{part.path}.") for part in found) == 1 for path in paths)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_the_walk_gives_what_both_programs_compute(name: str, memory: int, simulated, family, texts) -> None:
    """Inputs of the quantized program, targets of the float one; without memory they lie in files."""
    program, reference = simulated(name, "W4A8"), family(name)
    batches, both = texts(program), pairs(program, reference, "lkd")
    for inputs in ("quantized", "float"):
        for step in Walk(both, batches, inputs=inputs, memory=memory):
            mine, theirs = both[step.index]
            side, source = (program, mine.source) if inputs == "quantized" else (reference, theirs.source)
            assert (len(step.inputs), len(step.targets)) == (3, 3)
            for index, batch in enumerate(batches):
                expected = values_of(side, [source], batch)[source.name]
                torch.testing.assert_close(step.inputs[index], expected)
                expected = values_of(reference, [theirs.output], batch)[theirs.output.name]
                torch.testing.assert_close(step.targets[index], expected)
                assert is_mapped(step.inputs[index]) == is_mapped(step.targets[index]) == (memory == 0)


def test_what_a_step_writes_counts_from_the_next_block_on(simulated, family, texts) -> None:
    program, reference = simulated("llama", "W4A16"), family("llama")
    batches, name = texts(program), "model.layers.0.mlp.down_proj.weight"
    for step in Walk(pairs(program, reference, "lkd"), batches):
        if step.index == 0:
            set_tensor(program.module, name, torch.nn.Parameter(torch.zeros_like(get_tensor(program.module, name))))
        else:
            source = step.part.source
            assert torch.equal(step.inputs[0], values_of(program, [source], batches[0])[source.name])


class _Products(TorchDispatchMode):
    """Counts matrix products with each of these weights as it is."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.counts = {weight.untyped_storage().data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            for value in args:
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.counts:
                    self.counts[value.untyped_storage().data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pass_", BOTH, ids=lambda p: p.name)
def test_the_float_blocks_run_once_on_each_batch(pass_, family, simulated, texts, run) -> None:
    program, reference = simulated("llama", "W4A16"), family("llama")
    weights = [
        get_tensor(reference.module, str(parameter_of(LinearNode(node).weight).target))
        for node in linears(reference.graph)
        if node.meta["path"] != "lm_head"
    ]
    context = Context(texts(program), reference=reference)
    batches = chosen_data(program, context, pass_.held_out, "lkd").batches
    with _Products(weights) as products:
        run(program, pass_, context=context)
    assert set(products.counts.values()) == {len(batches)}


def test_the_float_model_is_the_pipelines_or_the_program_unrounded(simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W4A16"), family("llama")
    assert float_reference(program, Context(reference=reference)) is reference
    twin = float_reference(program, Context())
    assert not list(twin.quantizers())
    rounded = run(program, Autoround(iterations=1), context=Context(texts(program)))
    with pytest.raises(
        BitlowerError, match=r"the float model is not known any more, and model\.layers\.0.*weight is rounded"
    ):
        float_reference(rounded, Context())
    assert float_reference(rounded, Context(reference=reference)) is reference


def test_a_model_without_blocks_or_with_others_is_refused(tiny_program, simulated, family) -> None:
    with pytest.raises(BitlowerError, match="lkd: the model has no repeated blocks"):
        pairs(tiny_program, tiny_program, "lkd")
    with pytest.raises(BitlowerError, match="the program has 2 blocks, and the float model 2 or other ones"):
        pairs(simulated("llama", "W4A16"), family("phi"), "lkd")


def test_tensors_that_are_read_elsewhere_are_found(simulated) -> None:
    program = simulated("llama", "W4A16")
    assert [part.shared() for part in parts(program)] == [set(), set()]
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    set_tensor(program.module, second, get_tensor(program.module, first))
    assert [part.shared() for part in parts(program)] == [{first}, {second}]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_every_sequence_is_learned_on_or_held_out(rows: list[int], share: float) -> None:
    batches, start = [], 0
    for count in rows:
        batches.append({"x": torch.arange(start, start + count)})
        start += count
    if start < 2:
        with pytest.raises(BitlowerError, match="lkd needs two sequences of calibration data at least, not 1"):
            split(batches, share, cut=True, name="lkd")
        return
    found = split(batches, share, cut=True, name="lkd")
    learned, held_out = (
        [int(v) for batch in part for v in batch["x"]]
        for part in (found.batches[: found.learned], found.batches[found.learned :])
    )
    assert sorted(learned + held_out) == list(range(start))
    assert len(held_out) == max(1, min(start - 1, round(start * share)))
    units, _ = found.units()
    assert [int(found.batches[batch]["x"][row]) for batch, row in units] == learned


def test_training_data_come_first_and_without_labels(family, texts) -> None:
    program = family("bert")
    [first, second, third] = texts(program)
    labelled = {**first, "labels": torch.zeros(2)}
    found = chosen_data(program, Context([third], training=[labelled], held_out=[second]), 0.5, "lkd")
    assert found.learned == 1
    assert [set(batch) for batch in found.batches] == [set(first)] * 2
    assert found.batches[0]["input_ids"] is first["input_ids"]
    assert found.batches[1]["input_ids"] is second["input_ids"]


@pytest.mark.parametrize("weighting", ["none", "unit-norm", "clipped-norm"])
def test_the_error_is_that_of_real_tokens_as_they_are_weighted(simulated, family, texts, weighting: str) -> None:
    """Written out in numpy, float64."""
    program, reference = simulated("llama", "W3A16"), family("llama")
    block = first_block(program, Context(texts(program), reference=reference), weighting)
    step, data, model = block.step, block.data, block.part.module()
    norms, errors, places = [], [], []
    for index, batch in enumerate(data.batches):
        with torch.no_grad():
            [output] = model(*step.arguments(batch, index))
        real = batch["attention_mask"].bool().numpy()
        target = step.targets[index].numpy().astype(np.float64)[real]
        norms.append((target**2).sum(-1))
        errors.append(((output.numpy().astype(np.float64)[real] - target) ** 2).sum(-1))
        places += [index >= data.learned] * len(target)
    norm, error, held = np.concatenate(norms), np.concatenate(errors), np.array(places)
    weight = {
        "none": np.ones_like(norm),
        "unit-norm": 1 / norm,
        "clipped-norm": np.minimum(1, 2 * np.sort(norm)[(len(norm) - 1) // 2] / norm),
    }[weighting]
    expected = (weight * error)[held].sum() / (weight * norm)[held].sum()
    assert block.held_out_error(model) == pytest.approx(expected, rel=1e-4)
    expected = (weight * error)[~held].sum() / (weight * norm)[~held].sum()
    assert block.backward(model, block.learned) == pytest.approx(expected, rel=1e-4)
    assert block.tokens == int((~held).sum())


def test_many_tokens_are_run_in_parts(simulated, family, texts, monkeypatch) -> None:
    program, reference = simulated("llama", "W3A16"), family("llama")
    block = first_block(program, Context(texts(program), reference=reference), "unit-norm")
    model, name = block.part.module(), "model.layers.0.mlp.down_proj.weight"
    found = []
    for tokens in (1 << 20, 1):
        monkeypatch.setattr(data_module, "TOKENS", tokens)
        assert len(list(block.picks(block.learned))) == (1 if tokens > 1 else len(block.learned))
        model.zero_grad()
        block.backward(model, block.learned)
        found.append(get_tensor(model, name).grad.clone())
    torch.testing.assert_close(found[0], found[1])
    assert bool(found[0].any())


@pytest.mark.parametrize("pass_", BOTH, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_stands_in_padding_changes_nothing(name: str, pass_, simulated, family, texts, run) -> None:
    program, reference = simulated(name, "W4A8-token"), family(name)
    results = []
    for seed in (0, 1):
        batches = texts(program)
        for batch in batches:
            hidden = batch["attention_mask"] == 0
            noise = torch.randint(3, 60, hidden.shape, generator=torch.Generator().manual_seed(seed))
            batch["input_ids"] = torch.where(hidden, noise, batch["input_ids"])
        results.append(run(program, pass_, context=Context(batches, reference=reference)))
    for (target, first), (_, second) in zip(results[0].tensors(), results[1].tensors(), strict=True):
        assert torch.equal(first, second), target


def live() -> dict[int, int]:
    """The bytes of every storage under a tensor that is alive, by address."""
    gc.collect()
    found = (item.untyped_storage() for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.fixture
def young() -> None:
    """Only objects that are made from here on are collected, and listed: there are many older ones."""
    gc.freeze()


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("pass_", BOTH, ids=lambda p: p.name)
def test_what_is_held_does_not_grow_with_the_number_of_blocks(pass_, run, monkeypatch) -> None:
    """Block, gradients, optimizer, values; the program and its reference have all blocks and are not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    original, peaks = BlockData.backward, {}
    for layers in (2, 4):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        reference = run(load(LlamaForCausalLM(config).eval(), task="text-generation"), Clean())
        program = run(reference, Quantize(Scheme.parse("W4A16")), Rtn())
        ids = torch.randint(0, 60, (4, 8), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8).expand(4, 8)}
        before = live()
        seen: list[int] = []

        def backward(self, model, units, program=program, before=before, seen=seen):
            loss = original(self, model, units)
            known = {*before, *(tensor.untyped_storage().data_ptr() for _, tensor in program.tensors())}
            seen.append(sum(size for place, size in live().items() if place not in known))
            return loss

        monkeypatch.setattr(BlockData, "backward", backward)
        replace(pass_, iterations=2).run(program, Context([batch], reference=reference))
        assert len(seen) == 2 * layers
        peaks[layers] = max(seen)
    assert peaks[4] <= 1.02 * peaks[2]


def test_the_summary_names_what_stayed() -> None:
    rows = (
        TrainedBlockRow("layer.0", 8, 0.5, 0.25, 3, ()),
        TrainedBlockRow("layer.1", 8, 0.5, 0.5, 0, ("layer.1: odd",)),
    )
    assert BlockReport(rows).text().splitlines() == [
        "error of block outputs 0.5 → 0.375 (held-out, mean of 2 blocks)",
        "  unchanged: layer.1",
        "  layer.1: odd",
    ]


def test_learning_ends_where_the_loss_is_not_finite(simulated, family, texts, monkeypatch) -> None:
    """What is kept is the best state of those that were looked at before."""
    program, reference = simulated("llama", "W3A16"), family("llama")
    block = first_block(program, Context(texts(program), reference=reference), "none")
    parameter = torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(BlockData, "held_out_error", lambda self, model: parameter.detach().square().sum().item())
    losses = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(BlockData, "backward", lambda self, model, units: next(losses))
    shares = []

    def update(share: float) -> None:
        shares.append(share)
        with torch.no_grad():
            parameter.mul_(0.5)

    schedule = loop_module.Schedule(10, 2)
    outcome = loop_module.learn(block, block.part.module(), [parameter], update, schedule, torch.Generator())
    assert (outcome.before, outcome.after, outcome.step) == (2.0, 0.125, 2)
    assert outcome.notes == ("model.layers.0: the loss was not finite at step 3, where learning ended",)
    assert torch.equal(parameter.detach(), torch.full((2,), 0.25))
    assert shares == [1.0, 0.9]
