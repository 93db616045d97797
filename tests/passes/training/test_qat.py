"""The pass `qat`: it learns, keeps the best, goes on after a kill, and refuses what it cannot do."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError, Program, get_tensor, ops, serialize, set_tensor
from bitlower.ir.dataflow import NORM
from bitlower.ir.quantization import numerics
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes._machinery.losses import Losses
from bitlower.passes.training import LogitsLoss, Loss, _forward
from bitlower.passes.training._devices import Devices
from bitlower.passes.training._optimizer import Rates
from bitlower.passes.training._report import TrainReport
from bitlower.passes.training.qat import Qat

ALL = Rates((("weights", 1e-3), ("embeddings", 1e-3), ("norms", 1e-3), ("biases", 1e-3), ("scales", 1e-3)))
QUICK = Qat(steps=16, evaluate_every=4, learning_rate=ALL)


def labelled(batches, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = batches(count, rows=8, seed=seed)
    return [{**batch, "labels": torch.randint(0, 3, (8,), generator=generator)} for batch in made]


@pytest.fixture(scope="module")
def simulated(bert, batches):
    """A small classifier with everything quantized, and the context of the run, which knows the float model.

    Its head is made larger: logits of a fresh model are so small that any rounding leaves them as they are.
    """
    program = bert()[1].clone()
    head = get_tensor(program.module, "classifier.weight").detach()
    set_tensor(program.module, "classifier.weight", torch.nn.Parameter(40 * head))
    context = Context(batches(2), batches(1, seed=9), training=labelled(batches), held_out=labelled(batches, 2, 7))
    passes = parse_pipeline("clean,quantize{scheme=W3A8-full},calibrate")
    return PassManager(passes).run(program, context), context


def train(simulated, pass_=QUICK, **changes):
    program, context = simulated
    context = replace(context, results={}, **changes)
    return PassManager([pass_]).run(program, context), context.results.get(TrainReport)


def kl(program: Program, reference: Program, batches) -> float:
    """Mean KL divergence of the logits from the reference's, in float64."""
    found = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        student, teacher = (
            model(**inputs)["logits"].detach().numpy().astype(np.float64) for model in (program, reference)
        )
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
        found.append((p * np.log(p / q)).sum(-1).mean())
    return float(np.mean(found))


def test_the_divergence_from_the_float_model_falls(simulated):
    program, context = simulated
    trained, report = train(simulated)
    before, after = (kl(p, context.reference, context.held_out) for p in (program, trained))
    assert after < 0.7 * before
    assert report.curve[0].held_out == pytest.approx(before, rel=1e-4)
    best = next(point for point in report.curve if point.step == report.best_step)
    assert best.held_out == pytest.approx(after, rel=1e-4)
    assert best.held_out == min(point.held_out for point in report.curve)
    assert [point.step for point in report.curve] == [0, 4, 8, 12, 16]


def test_the_preset_ranges_learns_ranges_alone(simulated):
    program, context = simulated
    trained, _ = train(simulated, Qat(preset="ranges", steps=16, evaluate_every=4, warmup=0.0))
    pairs = zip(program.tensors(), trained.tensors(), strict=True)
    kinds = {name.rpartition(".")[2] for (name, old), (_, new) in pairs if not torch.equal(old, new)}
    assert "scale" in kinds <= {"scale", "zero_point"}
    before, after = (kl(p, context.reference, context.held_out) for p in (program, trained))
    assert after < before


def test_nothing_leaves_worse_than_it_came_in(simulated):
    wild = replace(QUICK, learning_rate=Rates((("weights", 1.0), ("scales", 1.0))), clip=0.0)
    trained, report = train(simulated, wild)
    assert report.best_step == 0
    assert trained.digest() == simulated[0].digest()
    last, report = train(simulated, replace(wild, keep="last"))
    assert report.best_step == 16
    assert kl(last, simulated[1].reference, simulated[1].held_out) > report.curve[0].held_out


def test_equal_seeds_give_equal_bytes_and_others_do_not(simulated):
    first, second = (train(simulated)[0].digest() for _ in range(2))
    assert first == second
    assert train(simulated, seed=1)[0].digest() != first


def test_padding_may_hold_garbage(simulated):
    """Token ids where the mask says that nothing is, in training, held-out and teacher's batches."""

    def spoiled(batch):
        ids = batch["input_ids"].clone()
        ids[batch["attention_mask"] == 0] = 77
        return {**batch, "input_ids": ids}

    _, context = simulated
    losses = Losses.from_list(["logits", "hidden", "attention"])
    plain, _ = train(simulated, replace(QUICK, losses=losses, steps=6))
    data = {part: [spoiled(batch) for batch in getattr(context, part)] for part in ("training", "held_out")}
    other, _ = train(simulated, replace(QUICK, losses=losses, steps=6), **data)
    for (name, mine), (_, theirs) in zip(other.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_a_role_or_pattern_with_the_rate_0_stays(simulated):
    program, _ = simulated
    rates = Rates((("weights", 1e-2), ("norms", 0), ("scales", 0), ("zero-points", 0), ("re:.*layer\\.0\\..*", 0)))
    trained, _ = train(simulated, replace(QUICK, learning_rate=rates, ranges="fixed", keep="last", steps=2))
    before = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    changed = {
        name for name in before if not torch.equal(get_tensor(trained.module, name), get_tensor(program.module, name))
    }
    assert any("layer.1" in name and name.endswith("weight") for name in changed)
    norms = {name for name, node in before.items() if any(user.target in NORM for user in node.users)}
    assert not [name for name in changed if "layer.0." in name or name.startswith("quantizers.") or name in norms]


def test_ranges_learn_freeze_and_stay_fixed(simulated):
    def moved(pass_):
        return [row.drift for row in train(simulated, replace(pass_, keep="last"))[1].quantizers]

    assert max(moved(QUICK)) > 0.01
    assert max(moved(replace(QUICK, freeze_ranges=0.0))) == 0
    assert max(moved(replace(QUICK, ranges="fixed"))) == 0
    assert max(moved(replace(QUICK, ranges="observed"))) > 0.01


def test_a_killed_training_ends_in_the_same_bytes(simulated, tmp_path: Path, monkeypatch):
    from bitlower.passes.training import _engine

    expected = train(simulated)[0].digest()
    original, steps = _engine.Training._step, []

    def step(self, number):
        if len(steps) in (7, 16):
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(number)
        return original(self, number)

    monkeypatch.setattr(_engine.Training, "_step", step)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(simulated, work=tmp_path)
    assert train(simulated, work=tmp_path)[0].digest() == expected
    assert steps == [*range(7), -1, *range(4, 12), -1, *range(12, 16)]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from bitlower.ir import serialize
from bitlower.passes import Cache, Context, PassManager
from bitlower.passes.training import _engine
from bitlower.passes.training.qat import Qat

folder, moment = Path(sys.argv[1]), int(sys.argv[2])
original = _engine.Training._step
def step(self, number):
    if number == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, number)
_engine.Training._step = step
data = torch.load(folder / "data.pt")
result = PassManager([Qat(steps=9, evaluate_every=2)], cache=Cache(folder / "cache")).run(
    serialize.load(folder / "program"), Context(training=data[:2], held_out=data[2:])
)
print(result.digest())
"""


def test_sigkill_at_any_step_ends_in_the_same_bytes(simulated, tmp_path: Path, run_script):
    program, context = simulated
    data = [*context.training[:2], *context.held_out]
    serialize.save(program, tmp_path / "program")
    torch.save(data, tmp_path / "data.pt")
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})"
    plain = Context(training=data[:2], held_out=data[2:])
    expected = PassManager([Qat(steps=9, evaluate_every=2)]).run(serialize.load(tmp_path / "program"), plain)
    for moment in (1, 4, 8, -1):
        done = run_script(threads + SCRIPT, tmp_path, moment)
        assert done.returncode == (0 if moment < 0 else -signal.SIGKILL), done.stderr
    assert done.stdout.strip() == expected.digest()


def test_trained_is_simulated_is_integer(simulated):
    _, context = simulated
    trained, _ = train(simulated)
    inputs = {name: value for name, value in context.held_out[0].items() if name != "labels"}
    lowered = PassManager(parse_pipeline("lower-integer")).run(trained, Context([inputs]))
    torch.testing.assert_close(lowered(**inputs)["logits"], trained(**inputs)["logits"], rtol=1e-4, atol=1e-4)


def test_the_task_is_learned_from_labels(simulated):
    pass_ = replace(QUICK, losses=Losses.from_list(["task"]), keep="last", steps=40)
    program, context = simulated
    held_out = list(context.training)
    _, report = train(simulated, pass_, held_out=held_out)
    assert report.curve[-1].held_out < 0.8 * report.curve[0].held_out
    logits = [program(**{n: v for n, v in b.items() if n != "labels"})["logits"].detach().numpy() for b in held_out]
    labels = [batch["labels"].numpy() for batch in held_out]
    rows, classes = np.concatenate(logits).astype(np.float64), np.concatenate(labels)
    expected = np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), classes]
    assert report.curve[0].held_out == pytest.approx(expected.mean(), rel=1e-5)


@pytest.fixture(scope="module")
def decoder(family, feed):
    program = family("llama")
    data = [without_past(feed(program, seed=seed)) for seed in range(5)]
    context = Context(data[:2], data[4:], training=data[:4], held_out=data[4:])
    return PassManager(parse_pipeline("quantize{scheme=W3A16-g8-e8},rtn")).run(program, context), context


def without_past(batch):
    return {name: value for name, value in batch.items() if not name.startswith("past")}


@pytest.mark.parametrize("chunk", [60, 7 * 60, 1 << 24])
def test_logits_in_chunks_give_the_same_training(decoder, chunk, monkeypatch):
    losses = Losses.from_list(
        [{"logits": {"temperature": 2.0}}, {"task": {"weight": 0.5}}, {"hidden": {"weight": 0.1}}]
    )
    pass_ = replace(QUICK, losses=losses, steps=6, evaluate_every=3)
    expected, first = train(decoder, pass_)
    monkeypatch.setattr(_forward, "_CHUNK", chunk)
    found, report = train(decoder, pass_)
    assert report.curve[0].terms == pytest.approx(first.curve[0].terms, rel=1e-5)
    for (name, mine), (_, theirs) in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_has_the_gradients_of_the_whole_model(decoder):
    """The head in chunks, against one backward pass through everything."""
    from bitlower.passes.training._objective import Evaluator, make_teacher

    program, context = decoder
    objective = Losses.from_list(["logits", {"task": {"weight": 0.5}}])
    module = program.trainable_module(taps=_forward.Taps.of(program, objective.needs).names)
    teacher = make_teacher(context.reference, objective, Devices(), None, 0)
    evaluator = Evaluator(program, module, objective, teacher, context, Devices())
    evaluator.losses(("training", 0), context.training[0], 0, gradient=1.0)
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    plain, batch = program.trainable_module(), context.training[0]
    mask = batch["attention_mask"].bool()
    student = plain(**batch)["logits"]
    with torch.no_grad():
        target = context.reference(**batch)["logits"].log_softmax(-1)
    divergence = (target.exp() * (target - student.log_softmax(-1))).sum(-1)[mask].mean()
    real = mask[:, 1:] & mask[:, :-1]
    ahead = torch.nn.functional.cross_entropy(student[:, :-1][real], batch["input_ids"][:, 1:][real])
    (divergence + 0.5 * ahead).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_scores_of_attention_leave_out_what_the_model_does_not_see(decoder):
    """Explicit attention (quantized inside) and the operator give the same; later tokens have −∞."""
    _, context = decoder
    program, batch = context.reference, context.training[0]
    opened = PassManager(parse_pipeline("quantize{scheme=W8A8-full},calibrate")).run(program, Context([batch]))
    found = []
    for made in (program, opened):
        taps = _forward.Taps.of(made, frozenset({"attention"}))
        module = made.trainable_module(taps=taps.names).model
        found.append(_forward.Forward(made, module, taps, logits=False)(batch)[0].attention)
    plain, explicit = found
    assert len(plain) == len(explicit) == 2
    for mine, theirs in zip(plain, explicit, strict=True):
        assert mine.shape == theirs.shape == (2, 4, 5, 5)
        assert torch.equal(mine.isinf(), torch.ones(5, 5).triu(1).bool().expand(2, 4, 5, 5))
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.05)


def test_a_decoder_learns_and_its_tied_table_stays_one(decoder):
    program, context = decoder
    trained, _ = train(decoder, replace(QUICK, steps=30))
    assert kl_tokens(trained, context) < 0.85 * kl_tokens(program, context)
    quantized = [found.tensor for _, found in trained.quantizers()]
    assert len(quantized) == len(set(quantized))


def kl_tokens(program, context) -> float:
    batch = context.held_out[0]
    mask = batch["attention_mask"].bool()
    p, q = (model(**batch)["logits"][mask].detach().double().log_softmax(-1) for model in (context.reference, program))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_teacher_is_the_model_before_it_was_rounded(decoder):
    """After `rtn` or `gptq` the program itself is no float model any more."""
    program, context = decoder
    with pytest.raises(BitlowerError, match=r"the float model is not known any more.*in one pipeline"):
        train((rounded(program), context), reference=None)


def rounded(program):
    copy = program.clone()
    for node in copy.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        weight, scale, zero = (get_tensor(copy.module, str(n.target)) for n in node.args[:3])
        value = numerics.fake(weight.detach(), scale, zero, *node.args[3:5])
        set_tensor(copy.module, str(node.args[0].target), torch.nn.Parameter(value))
    return copy


@dataclass(frozen=True)
class Broken(LogitsLoss):
    """A loss that is not a number."""

    name: ClassVar[str] = "broken"

    def rows(self, student, teacher, labels):
        return student.sum(-1) * float("nan")


@dataclass(frozen=True)
class Steep(Loss):
    """A loss whose gradient is infinite."""

    name: ClassVar[str] = "steep"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def value(self, step, memory):
        return (step.student.hidden[-1] - step.student.hidden[-1].detach()).abs().sum().sqrt()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Broken(), r"step 1: the loss 'broken' of training batch \d is nan; all values before it are finite; lower"),
        (Steep(), r"step 1: the gradient of .* is not finite; lower the learning rate"),
    ],
)
def test_what_is_not_finite_is_named(simulated, loss, message):
    with pytest.raises(BitlowerError, match=message):
        train(simulated, replace(QUICK, losses=Losses((loss,))), held_out=[])


def test_bad_input_is_refused(simulated, bert, batches, family, feed):
    with pytest.raises(BitlowerError, match="qat needs training data; add a section `training` or `calibration`"):
        train(simulated, training=[], calibration=[])
    with pytest.raises(BitlowerError, match="the loss 'task' needs labels, and batch 1 of the training data has none"):
        train(simulated, replace(QUICK, losses=Losses.from_list(["task"])), training=batches(1))
    wrong = [{**batches(1)[0], "labels": torch.tensor([0, 3, 1])}]
    with pytest.raises(BitlowerError, match="has the label 3, and the head 3 classes; labels count from 0"):
        train(simulated, replace(QUICK, losses=Losses.from_list(["task"])), training=wrong)
    with pytest.raises(
        BitlowerError, match=r"the learning-rate pattern 'weigths' matches nothing.*did you mean 'weights'"
    ):
        train(simulated, replace(QUICK, learning_rate=Rates((("weigths", 1e-5),))))
    with pytest.raises(BitlowerError, match="no parameter learns"):
        train(
            simulated,
            replace(QUICK, learning_rate=Rates(tuple((role, 0.0) for role in Qat().rates.over({}).to_dict()))),
        )
    encoder = PassManager(parse_pipeline("quantize{scheme=W8A8},calibrate")).run(
        family("bert"), Context([feed(family("bert"))])
    )
    with pytest.raises(BitlowerError, match="the loss 'logits' needs logits, and the model gives last_hidden_state"):
        train((encoder, Context([feed(encoder)])))
    for field, value in (("steps", 0), ("warmup", 1.5), ("freeze_ranges", -0.1)):
        with pytest.raises(BitlowerError, match=f"qat: {field.replace('_', '-')} is {value:g}; it takes"):
            Qat(**{field: value})
    with pytest.raises(BitlowerError, match="the learning rate of 'weights' is -1"):
        Rates((("weights", -1),))


def test_the_report_tells_and_draws(simulated):
    _, report = train(simulated)
    text = report.text()
    assert f"the best was step {report.best_step}" in text
    assert "held-out loss" in text
    losses, drift, changed = report.charts()
    assert list(losses.lines) == ["training", "held out"]
    assert losses.chosen == (report.best_step, dict(losses.lines["held out"])[report.best_step])
    assert drift.names == tuple(row.tensor for row in report.quantizers)
    assert set(changed.names) <= set(drift.names)
    weights = [row for row in report.quantizers if row.changed is not None]
    assert max(row.changed for row in weights) > 0.05
    assert all(0 <= row.flipped <= 1 and 0 <= row.clipped <= 1 for row in weights)
