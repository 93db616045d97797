from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from bitlower.backends.onnx_qdq import export
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor, set_tensor
from bitlower.passes import Context
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding.rtn import Rtn
from bitlower.passes.training import lkd as module
from bitlower.passes.training._block_data import BlockData, chosen_data
from bitlower.passes.training._blocks import Walk, pairs
from bitlower.passes.training._part import parts
from bitlower.passes.training._teacher import float_reference
from bitlower.passes.training.lkd import Lkd, LkdReport, parameter_groups, random_tokens, trained_block

SHORT = Lkd(iterations=20, batch=3)


@pytest.fixture
def texts(feed):
    """``texts(program, 3)``: batches of two rows of five tokens, the first row padded on the left."""
    return lambda program, count=3, seed=0: [
        {name: value for name, value in feed(program, seed=seed + index).items() if "past" not in name}
        for index in range(count)
    ]


@pytest.fixture
def simulated(family, texts, run):
    def make(name: str, scheme: str) -> Program:
        program = family(name)
        return run(program, Quantize(Scheme.parse(scheme)), Calibrate(), context=Context(texts(program)))

    return make


def changed(first: Program, second: Program) -> set[str]:
    """The tensors in which two programs differ."""
    pairs_ = zip(first.tensors(), second.tensors(), strict=True)
    return {name.removeprefix("model/") for (name, one), (_, other) in pairs_ if not torch.equal(one, other)}


class _From(fx.Interpreter):
    """Runs a graph with the value of one node replaced, and keeps all values."""

    def __init__(self, program: Program, source: str, value: torch.Tensor) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.source, self.value, self.seen = source, value, {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = result = self.value if n.name == self.source else super().run_node(n)
        return result


@pytest.mark.parametrize("weighting", ["none", "unit-norm"])
def test_the_gradients_are_those_of_the_definition_in_float64(
    weighting: str, simulated, family, texts, in_float64
) -> None:
    """The whole float graph in double precision, its weights replaced by rounded ones that are leaves of autograd.

    Of a weight the gradient is the leaf's inside the range; of the logarithm of its scale it is
    ``Σ g · (ŵ − w)`` inside and ``Σ g · ŵ`` outside.
    """
    program, reference = simulated("llama", "W4A16"), family("llama")
    context = Context(texts(program), reference=reference)
    data = chosen_data(program, context, 0.3, "lkd")
    found = pairs(program, float_reference(program, context), "lkd")
    step = next(iter(Walk(found, data.batches)))
    block, trained = BlockData(step, data, weighting), trained_block(step.part)
    parameter_groups(trained, step.part, 1e-4, 1e-3)
    block.backward(trained.model, block.learned)

    wide, leaves = in_float64(reference), {}
    for node, quantizer in program.quantizers():
        if node in step.part.nodes:
            set_tensor(wide.module, quantizer.tensor, torch.nn.Parameter(node_values(program, node).double()))
            leaves[quantizer.tensor] = (node, get_tensor(wide.module, quantizer.tensor))
    total, energy = 0.0, 0.0
    for index in range(data.learned):
        batch = data.batches[index]
        runner = _From(wide, found[0][1].source.name, step.inputs[index].double())
        runner.run(*[v.double() if v.is_floating_point() else v for v in wide.arguments(batch)])
        real = batch["attention_mask"].bool()
        target = step.targets[index][real].double()
        weight = torch.ones(len(target)) if weighting == "none" else 1 / target.square().sum(-1)
        error = (runner.seen[found[0][1].output.name][real] - target).square().sum(-1)
        total, energy = total + (weight * error).sum(), energy + float((weight * target.square().sum(-1)).sum())
    (total / energy).backward()
    assert len(leaves) == 7
    for name, (node, leaf) in leaves.items():
        weight, scale = get_tensor(program.module, name).detach(), get_tensor(program.module, str(node.args[1].target))
        inside = (weight > -8 * scale) & (weight < 7 * scale)
        torch.testing.assert_close(
            get_tensor(trained.model, name).grad.double(), leaf.grad * inside, rtol=1e-3, atol=1e-6
        )
        rounded = leaf.detach()
        by_log = (leaf.grad * torch.where(inside, rounded - weight, rounded)).sum(1, keepdim=True)
        quantizer = next(q for q in trained.quantizers() if trained.weights[q] == name)
        found_grad = trained.quantizers()[quantizer].range.grad.double()
        torch.testing.assert_close(found_grad, by_log, rtol=1e-3, atol=1e-6)


def node_values(program: Program, node: fx.Node) -> torch.Tensor:
    return node.target(*(get_tensor(program.module, str(a.target)).detach() for a in node.args[:3]), *node.args[3:])


@pytest.mark.parametrize(("name", "scheme"), [("llama", "W3A16"), ("llama", "W4A8-e8"), ("bert", "W4A8-full")])
def test_the_error_of_every_block_falls(name: str, scheme: str, simulated, family, texts, run) -> None:
    program, reference = simulated(name, scheme), family(name)
    context = Context(texts(program, 4), reference=reference)
    result = run(program, Lkd(iterations=40, batch=4, learning_rate=0.1, scale_learning_rate=1e-2), context=context)
    rows = context[LkdReport].rows
    assert all(0 < row.step <= 40 and row.after < row.before for row in rows)
    inside = {str(n.target) for part in parts(program) for n in part.nodes if n.op == "get_attr"}
    moved = changed(program, result)
    assert moved <= inside
    kinds = ("weight", "scale")
    assert all(any(target.endswith(kind) for target in moved) for kind in kinds)
    integer = run(result, LowerInteger())
    batch = texts(program, 1, seed=9)[0]
    with torch.no_grad():
        for output, value in result(**batch).items():
            assert torch.equal(value, integer(**batch)[output])


def test_outputs_are_closer_to_the_float_models(simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W3A16-e16"), family("llama")
    result = run(program, Lkd(iterations=100), context=Context(texts(program, 12), reference=reference))
    errors = []
    for each in (program, result):
        with torch.no_grad():
            errors.append(
                sum(
                    float((each(**b)["logits"] - reference(**b)["logits"]).square().sum())
                    for b in texts(program, 4, seed=50)
                )
            )
    assert errors[1] < 0.8 * errors[0]


def test_a_block_that_gets_worse_keeps_what_it_had(simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W8A16"), family("llama")
    context = Context(texts(program), reference=reference)
    wild = Lkd(iterations=5, batch=3, learning_rate=1.0, scale_learning_rate=3.0)
    result = program.clone()
    assert not wild.run(result, context)
    assert not changed(program, result)
    assert [row.step for row in context[LkdReport].rows] == [0, 0]


def test_rates_are_in_steps_of_grids(simulated) -> None:
    program = simulated("llama", "W3A16-g16")
    part = parts(program)[0]
    trained = trained_block(part)
    rates = {id(parameter): rate for parameter, rate in parameter_groups(trained, part, 0.02, 1e-3)}
    found = {name: rates[id(parameter)] for name, parameter in trained.model.named_parameters()}
    for name in trained.quantizers():
        assert found.pop(f"{name}.range") == 1e-3
        scale = get_tensor(program.module, trained.stored[name][0])
        assert found.pop(trained.weights[name]) == pytest.approx(0.02 * scale.double().mean().item(), rel=1e-6)
    assert set(found) == {f"model.layers.0.{which}_layernorm.weight" for which in ("input", "post_attention")}
    for name, rate in found.items():
        weight = get_tensor(program.module, name).detach().double()
        assert rate == pytest.approx(0.02 / 20 * weight.abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("rate", "scale_rate"), [(0.0, 1e-2), (1e-3, 0.0)])
def test_a_rate_of_zero_freezes(rate: float, scale_rate: float, simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W3A16"), family("llama")
    pass_ = Lkd(iterations=20, batch=3, learning_rate=rate, scale_learning_rate=scale_rate)
    moved = changed(program, run(program, pass_, context=Context(texts(program), reference=reference)))
    assert moved
    assert all(target.startswith("quantizers.") == (rate == 0) for target in moved)


def test_tensors_that_another_block_reads_stay(simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W3A16"), family("llama")
    first, second = (f"model.layers.{i}.input_layernorm.weight" for i in range(2))
    for each in (program, reference):
        set_tensor(each.module, second, get_tensor(each.module, first))
    context = Context(texts(program), reference=reference)
    result = run(program, SHORT, context=context)
    moved = changed(program, result)
    assert moved
    assert not moved.intersection({first, second})
    assert context[LkdReport].rows[0].notes == (f"{first} is read outside model.layers.0 too, and stays",)


def test_a_weight_under_two_names_in_one_block_stays_one(simulated, family, texts, run) -> None:
    program, reference = simulated("bert", "W3A16"), family("bert")
    names = [f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key")]
    for each in (program, reference):
        set_tensor(each.module, names[1], get_tensor(each.module, names[0]))
    calibrated = run(program, Calibrate(), context=Context(texts(program)))
    result = run(calibrated, SHORT, context=Context(texts(program), reference=reference))
    assert get_tensor(result.module, names[0]) is get_tensor(result.module, names[1])
    assert names[0] in changed(calibrated, result)


def test_random_tokens_keep_padding_and_a_common_first_token(family, texts) -> None:
    program = family("llama")
    data = chosen_data(program, Context(texts(program)), 0.3, "lkd")
    for first in (None, 7):
        for batch in data.batches:
            start = batch["attention_mask"].argmax(1)
            if first is not None:
                batch["input_ids"][torch.arange(len(start)), start] = first
        found = random_tokens(program, data, torch.Generator().manual_seed(0))
        assert (found.learned, found.cut) == (data.learned, data.cut)
        assert all(a is b for a, b in zip(found.batches[data.learned :], data.batches[data.learned :], strict=True))
        drawn = []
        for old, new in zip(data.batches[: data.learned], found.batches[: data.learned], strict=True):
            hidden = old["attention_mask"] == 0
            assert torch.equal(old["input_ids"][hidden], new["input_ids"][hidden])
            start = old["attention_mask"].argmax(1)
            kept = new["input_ids"][torch.arange(len(start)), start]
            assert first is None or bool((kept == first).all())
            assert all(new[name] is old[name] for name in old if name != "input_ids")
            drawn.append(new["input_ids"][~hidden])
        assert len(torch.cat(drawn).unique()) > 5
        assert int(torch.cat(drawn).max()) < 60
    again = random_tokens(program, data, torch.Generator().manual_seed(0))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found.batches, again.batches, strict=True))


def test_random_tokens_teach_too(simulated, family, texts, run) -> None:
    program, reference = simulated("llama", "W3A16"), family("llama")
    context = Context(texts(program, 6), reference=reference)
    run(program, Lkd(iterations=60, data="random"), context=context)
    assert all(row.after < row.before for row in context[LkdReport].rows)


def test_random_tokens_need_a_model_of_tokens(simulated, family, texts, run) -> None:
    program = simulated("llama", "W3A16")
    del program.config["vocab_size"]
    with pytest.raises(BitlowerError, match="lkd: random tokens need a model with `input_ids` and a vocabulary"):
        run(program, Lkd(data="random"), context=Context(texts(program)))


def test_equal_seeds_give_equal_bytes_and_others_do_not(simulated, family, texts, run) -> None:
    program, reference = simulated("bert", "W4A8"), family("bert")
    first, again, other = (
        run(program, SHORT, context=Context(texts(program), seed=seed, reference=reference)) for seed in (1, 1, 2)
    )
    assert not changed(first, again)
    assert changed(first, other)


def test_the_artifact_is_verified(simulated, family, texts, run, tmp_path: Path) -> None:
    program, batches = simulated("bert", "W8A8"), texts(family("bert"))
    result = run(program, SHORT, LowerInteger(), context=Context(batches, reference=family("bert")))
    export(result, tmp_path, batches=batches[:1])


def test_a_quantizer_without_a_range_is_named(family, texts, run) -> None:
    placed = run(family("llama"), Quantize(Scheme.parse("W4A8")), Rtn())
    with pytest.raises(BitlowerError, match=r"model\.layers\.0.*a quantizer without a range cannot be trained"):
        run(placed, SHORT, context=Context(texts(placed)))


def test_no_data_is_refused(simulated, run) -> None:
    with pytest.raises(BitlowerError, match="lkd needs two sequences of calibration data at least, not 0"):
        run(simulated("llama", "W4A16"), SHORT)


@pytest.mark.parametrize(
    ("field", "value"),
    [("iterations", 0), ("batch", 0), ("learning_rate", -0.1), ("scale_learning_rate", -0.1), ("held_out", 1.0)],
)
def test_parameters_out_of_range_are_named(family, run, field: str, value: float) -> None:
    with pytest.raises(BitlowerError, match=f"lkd: {field.replace('_', '-')} is {value}"):
        run(family("llama"), module.Lkd(**{field: value}))


def test_something_must_learn(family, run) -> None:
    with pytest.raises(BitlowerError, match="lkd: both learning rates are 0"):
        run(family("llama"), Lkd(learning_rate=0.0, scale_learning_rate=0.0))
