"""Trials against full runs of programs whose quantizers are really off or really have other grids: equal to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import fx

from bitlower.frontends import load
from bitlower.ir import Batch, BitlowerError, Program, Scheme, get_tensor
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.precision import _trials as trials_module
from bitlower.passes.precision._items import set_width
from bitlower.passes.precision._measures import Measure
from bitlower.passes.precision._trials import Rounding, Setting, Switch, Trials
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


@pytest.fixture(scope="module")
def classifier(bert, batches, run) -> tuple[Program, list[Batch]]:
    _, program = bert(layers=2, labels=3)
    data = batches(2)
    passes = (Clean(), Quantize(Scheme.parse("W4A8-full")), Calibrate())
    return run(program, *passes, context=Context(calibration=data)), data


@pytest.fixture(scope="module")
def decoder(run) -> tuple[Program, list[Batch]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    program = load(LlamaForCausalLM(config).eval(), task="text-generation")
    ids = [torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    data = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "position_ids": torch.arange(6).expand(2, 6)}
        for i in ids
    ]
    passes = (Clean(), Quantize(Scheme.parse("W4A8-token-e4")), Calibrate())
    return run(program, *passes, context=Context(calibration=data)), data


def naive(
    program: Program, setting: Setting, batches: Sequence[Batch], outputs: Sequence[str]
) -> list[list[torch.Tensor]]:
    """The outputs of a program in which each quantizer of ``setting`` is really removed or really has that grid."""
    copy = program.clone()
    named = {node.name: state for node, state in setting.items()}
    for node in list(copy.graph.nodes):
        state = named.get(node.name)
        if isinstance(state, Rounding):
            set_width(node, state.grid.bits)
            if state.scale is not None:
                QuantizerNode(node).set_range(copy.module, state.scale, state.zero_point)
        elif state is Switch.OFF:
            node.replace_all_uses_with(node.args[0])
            node.graph.erase_node(node)
    copy.recompile()
    with torch.no_grad():
        return [[copy(**batch)[name] for name in outputs] for batch in batches]


def naive_loss(program: Program, setting: Setting, batches: Sequence[Batch], measure: Measure) -> float:
    off = dict.fromkeys((node for node, _ in program.quantizers()), Switch.OFF)
    expected = naive(program, off, batches, measure.outputs)
    found = naive(program, setting, batches, measure.outputs)
    return measure.total([measure.compare(e, f, b) for e, f, b in zip(expected, found, batches, strict=True)])


def wider(program: Program, node: fx.Node, bits: int) -> Rounding:
    """Another grid over about the same range."""
    grid = node.meta["quantizer"].spec.grid
    new = replace(grid, bits=bits)
    if node.args[1].op != "get_attr":
        return Rounding(new)
    scale, zero = (get_tensor(program.module, node.args[part].target) for part in (1, 2))
    factor = (grid.quant_max - grid.quant_min) / (new.quant_max - new.quant_min)
    return Rounding(new, scale * factor, torch.round(zero / factor).clamp(new.quant_min, new.quant_max))


def random_settings(program: Program, count: int) -> list[Setting]:
    """Some quantizers off, some on other grids, from anywhere in the graph."""
    chooser, nodes = random.Random(0), [node for node, _ in program.quantizers()]
    settings = []
    for _ in range(count):
        chosen = chooser.sample(nodes, chooser.randint(0, 4))
        states = {
            n: Switch.OFF if chooser.random() < 0.5 else wider(program, n, chooser.choice([2, 3, 6])) for n in chosen
        }
        settings.append(states)
    return settings


@pytest.mark.parametrize("model", ["classifier", "decoder"])
@pytest.mark.parametrize("budget", [1, 2 << 30])
def test_trials_equal_full_runs(model: str, budget: int, request: pytest.FixtureRequest) -> None:
    program, data = request.getfixturevalue(model)
    measure = Measure.choose(program, "kl")
    settings = random_settings(program, 12)
    found = Trials(program, data, measure, budget=budget).run(settings)
    assert found == [naive_loss(program, setting, data, measure) for setting in settings]
    assert len(set(found)) > 6


@pytest.mark.parametrize("model", ["classifier", "decoder"])
def test_quantizers_that_are_on_alone(model: str, request: pytest.FixtureRequest) -> None:
    program, data = request.getfixturevalue(model)
    measure = Measure.choose(program, "sqnr")
    trials = Trials(program, data, measure)
    nodes = trials.quantizers
    alone = [{nodes[0]: Switch.ON}, {nodes[-1]: Switch.ON}, {n: Switch.ON for n in nodes[3:9]}]
    found = trials.run(alone, baseline=trials.off)
    assert found == [naive_loss(program, {**trials.off, **setting}, data, measure) for setting in alone]
    assert trials.run([{}], baseline=trials.off) == [0.0]


def test_a_baseline_of_other_grids(classifier) -> None:
    program, data = classifier
    measure = Measure.choose(program, "kl")
    trials = Trials(program, data, measure)
    base = {node: wider(program, node, 3) for node in trials.quantizers[::3]}
    settings = [{trials.quantizers[0]: Switch.OFF}, {trials.quantizers[40]: Switch.ON}, {}]
    expected = [naive_loss(program, {**base, **setting}, data, measure) for setting in settings]
    assert trials.run(settings, baseline=base) == expected


def test_equal_trials_run_once(classifier) -> None:
    program, data = classifier
    trials = Trials(program, data, Measure.choose(program, "kl"))
    first, second = trials.quantizers[:2]
    one, same, none = {first: Switch.OFF}, {first: Switch.OFF, second: Switch.ON}, {second: Switch.ON}
    losses = trials.run([one, same, none, one])
    assert trials.runs == 2
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_work_is_shared(classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in the last layer runs none of the linears before it, and weights are rounded once."""
    program, data = classifier
    trials = Trials(program, data, Measure.choose(program, "kl"))
    computed: list[fx.Node] = []
    plan, compute = trials.plan, trials.plan.compute

    def record(node: fx.Node, state: object, value: object) -> object:
        if state is not Switch.OFF:
            computed.append(node)
        return compute(node, state, value)

    monkeypatch.setattr(plan, "compute", record)
    activations = [n for n in trials.quantizers if n.args[0].op != "get_attr"]
    trials.run([{node: Switch.OFF} for node in activations[-12:]])
    counts = {node: computed.count(node) for node in computed}
    first_linear = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    runs = 3 * len(data)  # to see how much memory a run takes (one batch), for the reference, and as the baseline
    assert counts[first_linear] <= runs
    weights = [n for n in trials.quantizers if n.args[0].op == "get_attr"]
    assert max(counts[n] for n in weights if n in counts) <= 2
    assert sum(counts.values()) < 0.5 * len(plan.order) * len(data) * 12


def test_values_of_the_baseline_are_let_go(classifier) -> None:
    program, data = classifier
    trials = Trials(program, data, Measure.choose(program, "kl"))
    plan = trials.plan
    constants = trials_module._Constants(plan, {}, 0)
    line = trials_module._Line(plan, data[0], {}, constants)
    most = 0
    for position in range(len(plan.nodes)):
        line.advance(position)
        most = max(most, len(line.values))
    assert most < 20 < len(plan.order) / 5


def test_there_must_be_data(classifier) -> None:
    program, _ = classifier
    with pytest.raises(BitlowerError, match="calibration data"):
        Trials(program, [], Measure.choose(program, "kl"))
