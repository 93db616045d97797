from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from bitlower.backends.onnx_qdq import export
from bitlower.ir import (
    BitlowerError,
    Granularity,
    Grid,
    Program,
    QuantSpec,
    Scheme,
    get_tensor,
    ops,
    serialize,
    set_tensor,
)
from bitlower.ir.quantization import numerics
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding.rtn import Rtn
from bitlower.passes.training import autoround as module
from bitlower.passes.training._blocks import pairs
from bitlower.passes.training._part import parts
from bitlower.passes.training._sign_round import SignRound
from bitlower.passes.training._teacher import float_reference
from bitlower.passes.training.autoround import Autoround, AutoroundReport, rounding_block

SHORT = Autoround(iterations=20, batch=3)


@pytest.fixture
def texts(feed):
    """``texts(program, 3)``: batches of two rows of five tokens, the first row padded on the left."""
    return lambda program, count=3, seed=0: [
        {name: value for name, value in feed(program, seed=seed + index).items() if "past" not in name}
        for index in range(count)
    ]


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    """Weights of linears with a quantizer, by name."""
    found = (q.tensor for _, q in program.quantizers() if q.role == "linear-weight")
    return {name: get_tensor(program.module, name).detach() for name in found}


def rounding(shape: tuple[int, int], spec: QuantSpec) -> tuple[torch.Tensor, SignRound]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low, high = spec.granularity.range_of(weight)
    return weight, SignRound(spec, weight, *spec.grid.qparams(low, high))


SPECS = [
    QuantSpec(Grid(3, signed=False, symmetric=False), Granularity.per_group(8)),
    QuantSpec(Grid(4), Granularity.per_channel(0)),
    QuantSpec(Grid(2, signed=False, symmetric=False), Granularity.per_tensor()),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_start_is_round_to_nearest(spec: QuantSpec) -> None:
    weight, learner = rounding((6, 16), spec)
    expected = numerics.fake(weight, learner.scale, learner.zero_point, spec.grid.quant_min, spec.grid.quant_max)
    found, scale, zero = learner.rounded(weight)
    assert torch.equal(found, expected)
    assert torch.equal(scale, learner.scale)
    assert torch.equal(zero, learner.zero_point)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_first_updates_are_the_papers_written_out(spec: QuantSpec) -> None:
    """``s = (max α − min β) / (2^b − 1)``, ``Ŵ = s·(clip(⌊W/s + V⌉ + z) − z)``, steps against the sign, in numpy."""
    weight, learner = rounding((6, 16), spec)
    inputs = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    targets = inputs @ weight.T
    w, x, y = (part.double().numpy() for part in (weight, inputs, targets))
    low, high = spec.grid.quant_min, spec.grid.quant_max
    layout = {"group": (6, 2, 8), "channel": (6, 1, 16), "tensor": (1, 1, 96)}[spec.granularity.kind]
    shape = (*layout[:2], 1)
    s0, z0 = (part.double().numpy().reshape(shape) for part in (learner.scale, learner.zero_point))
    shift, alpha, beta = np.zeros(layout), np.ones(shape), np.ones(shape)
    symmetric = spec.grid.symmetric
    for rate in (0.05, 0.03):
        loss = (inputs @ learner(weight).T - targets).square().sum()
        for parameter in learner.parameters():
            parameter.grad = None
        loss.backward()
        learner.update(rate)
        # the definition
        top, bottom = (high - z0) * s0 * alpha, (low - z0) * s0 * beta
        scale = s0 * alpha if symmetric else (top - bottom) / (high - low)
        zero = z0 if symmetric else np.round(low - bottom / scale)
        code = np.round(w.reshape(layout) / scale + shift) + zero
        inside = (code >= low) & (code <= high)
        rounded = scale * (np.clip(code, low, high) - zero)
        gradient = (2 * (x @ rounded.reshape(6, 16).T - y).T @ x).reshape(layout)
        # straight through rounding: by V, by s, by z
        by_shift = gradient * inside * scale
        by_scale = gradient * np.where(inside, code - zero - w.reshape(layout) / scale, np.clip(code, low, high) - zero)
        by_zero = gradient * np.where(inside, 0.0, -scale)
        by_scale, by_zero = by_scale.sum(-1, keepdims=True), by_zero.sum(-1, keepdims=True)
        if symmetric:
            by_alpha, by_beta = by_scale * s0, np.zeros(shape)
        else:  # s = (αH − βL)/N, z = low − βL/s
            span = high - low
            high0, low0 = (high - z0) * s0, (low - z0) * s0
            by_scale = by_scale + by_zero * bottom / scale**2
            by_alpha = by_scale * high0 / span
            by_beta = by_scale * -low0 / span - by_zero * low0 / scale
        shift = np.clip(shift - rate * np.sign(by_shift), -0.5, 0.5)
        alpha = np.clip(alpha - rate * np.sign(by_alpha), 0.5, 1)
        beta = beta if symmetric else np.clip(beta - rate * np.sign(by_beta), 0.5, 1)
        np.testing.assert_allclose(learner.shift.detach().numpy().reshape(layout), shift, atol=1e-6)
        np.testing.assert_allclose(learner.high.detach().numpy().reshape(shape), alpha, atol=1e-6)
        if not symmetric:
            np.testing.assert_allclose(learner.low.detach().numpy().reshape(shape), beta, atol=1e-6)
    assert bool((learner.shift != 0).any())
    assert bool((learner.high < 1).any())


def test_the_bounds_hold() -> None:
    weight, learner = rounding((6, 16), SPECS[0])
    before, _, _ = learner.rounded(weight)
    for _ in range(4):
        for parameter in learner.parameters():
            parameter.grad = torch.ones_like(parameter)
        learner.update(0.3)
    assert torch.equal(learner.shift.detach(), torch.full_like(weight, -0.5))
    assert torch.equal(learner.high.detach(), torch.full_like(learner.high, 0.5))
    assert torch.equal(learner.low.detach(), torch.full_like(learner.low, 0.5))
    found, scale, _ = learner.rounded(weight)
    torch.testing.assert_close(scale, learner.scale / 2)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("scheme", ["W3A16-g16-asym", "W4A16", "W4A8-token"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_lie_on_their_grids_and_the_error_falls(name: str, scheme: str, family, texts, run) -> None:
    reference = family(name)
    placed = run(reference, Quantize(Scheme.parse(scheme)))
    context = Context(texts(reference, 4), reference=reference)
    result = run(placed, Autoround(iterations=40, batch=4), context=context)
    rows = context[AutoroundReport].rows
    assert [row.tokens for row in rows] == [4 * (3 + 5) - 3] * 2  # the first row of a batch is held out
    assert all(row.after < row.before and 0 < row.step <= 40 for row in rows)
    nearest = run(placed, Rtn())
    for node in result.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        if node.args[0].op != "get_attr" or node.meta["quantizer"].role != "linear-weight":
            continue
        source, scale, zero = (get_tensor(result.module, str(a.target)) for a in node.args[:3])
        assert bool(scale.all())
        inside = any(node in part.nodes for part in parts(result))
        on_grid = torch.equal(ops.fake_quantize(source, scale, zero, *node.args[3:]), source)
        assert on_grid == inside
        if inside:
            other = get_tensor(nearest.module, str(node.args[1].target))
            assert bool((scale <= other * 1.0001).all() & (scale >= other * 0.4999).all())
    integer = run(result, Calibrate(), LowerInteger(), context=context)
    calibrated = run(result, Calibrate(), context=context)
    batch = texts(reference, 1, seed=9)[0]
    with torch.no_grad():
        for output, value in calibrated(**batch).items():
            assert torch.equal(value, integer(**batch)[output])


def test_outputs_are_closer_than_with_round_to_nearest(family, texts, run) -> None:
    reference = family("llama")
    placed = run(reference, Quantize(Scheme.parse("W3A16-g16-asym-e16")))
    batches, held_out = texts(reference, 12), texts(reference, 4, seed=50)
    errors = {}
    for name, pass_ in {"nearest": Rtn(), "learned": Autoround(iterations=100)}.items():
        result = run(placed, pass_, context=Context(batches, reference=reference))
        with torch.no_grad():
            errors[name] = sum(
                float((result(**b)["logits"] - reference(**b)["logits"]).square().sum()) for b in held_out
            )
    assert errors["learned"] < 0.8 * errors["nearest"]


def test_other_open_weights_are_rounded_to_nearest(family, texts, run) -> None:
    """Tables and heads; a norm's or a table's tensor stays, and its quantizer has the grid of `rtn`."""
    reference = family("bert")
    placed = run(reference, Quantize(Scheme.parse("W4A8-e4")))
    result = run(placed, SHORT, context=Context(texts(reference), reference=reference))
    nearest = run(placed, Rtn())
    name = "embeddings.word_embeddings.weight"
    [found, expected] = [
        next(get_tensor(p.module, str(n.args[1].target)) for n, q in p.quantizers() if q.tensor == name)
        for p in (result, nearest)
    ]
    assert torch.equal(found, expected)
    assert torch.equal(get_tensor(result.module, name), get_tensor(placed.module, name))


def test_calibrated_weights_start_from_their_grids(family, texts, run) -> None:
    reference = family("llama")
    calibrated = run(reference, Quantize(Scheme.parse("W3A16")), Rtn(ranges="mse-golden"))
    context = Context(texts(reference), reference=reference)
    [(part, _), _] = pairs(calibrated, float_reference(calibrated, context), "autoround")
    block = rounding_block(part)
    for name, learner in block.model.named_modules():
        if isinstance(learner, SignRound):
            places = block.stored[name]
            assert torch.equal(learner.scale, get_tensor(calibrated.module, places[0]))
    other = run(calibrated, SHORT, context=Context(texts(reference), reference=reference))
    plain = run(reference, Quantize(Scheme.parse("W3A16")), SHORT, context=Context(texts(reference)))
    assert any(not torch.equal(w, weights_of(plain)[name]) for name, w in weights_of(other).items())


def test_activation_quantizers_stay_as_they_are(family, texts, run) -> None:
    """Open ones let values through; closed ones round while weights learn."""
    reference, batches = family("llama"), texts(family("llama"))
    placed = run(reference, Quantize(Scheme.parse("W4A8")))
    results = {}
    for name, start in {"open": placed, "closed": run(placed, Calibrate(), context=Context(batches))}.items():
        result = run(start, SHORT, context=Context(batches, reference=reference))
        for node, quantizer in result.quantizers():
            if quantizer.role == "linear-input":
                scale = str(node.args[1].target)
                assert torch.equal(get_tensor(result.module, scale), get_tensor(start.module, scale))
        results[name] = weights_of(result)
    assert any(not torch.equal(weight, results["closed"][name]) for name, weight in results["open"].items())


def test_a_block_that_learns_nothing_is_rounded_to_nearest(family, texts, run, monkeypatch) -> None:
    """The guard: updates that only harm leave what was there."""
    reference = family("llama")
    placed = run(reference, Quantize(Scheme.parse("W4A16")))

    def harm(self, rate: float) -> None:
        with torch.no_grad():
            self.high.fill_(0.5)

    monkeypatch.setattr(SignRound, "update", harm)
    context = Context(texts(reference), reference=reference)
    result = run(placed, SHORT, context=context)
    report = context[AutoroundReport]
    assert [row.step for row in report.rows] == [0, 0]
    assert [row.after for row in report.rows] == [row.before for row in report.rows]
    assert [*report.details()] == ["unchanged: model.layers.0", "unchanged: model.layers.1"]
    nearest = run(placed, Rtn())
    batch = texts(reference, 1)[0]
    with torch.no_grad():
        assert torch.equal(result(**batch)["logits"], nearest(**batch)["logits"])


def test_a_weight_that_two_blocks_read_is_rounded_to_nearest(family, texts, run) -> None:
    reference = family("llama")
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    set_tensor(reference.module, second, get_tensor(reference.module, first))
    placed = run(reference, Quantize(Scheme.parse("W4A16")))
    context = Context(texts(reference), reference=reference)
    result = run(placed, SHORT, context=context)
    assert get_tensor(result.module, first) is get_tensor(result.module, second)
    assert torch.equal(get_tensor(result.module, first), get_tensor(placed.module, first))
    assert context[AutoroundReport].rows[0].notes == (f"{first} is read outside model.layers.0 too, and stays",)


def test_equal_seeds_give_equal_weights_and_others_do_not(family, texts, run) -> None:
    placed = run(family("llama"), Quantize(Scheme.parse("W3A16")))
    first, again, other = (
        weights_of(run(placed, SHORT, context=Context(texts(placed), seed=seed))) for seed in (1, 1, 2)
    )
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from bitlower.ir import serialize
from bitlower.passes import Cache, Context, PassManager, parse_pipeline
from bitlower.passes.training import _block_loop

folder, pipeline, blocks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
saved, done = _block_loop.save_checkpoint, []
def dying(*arguments):
    saved(*arguments)
    done.append(arguments)
    if len(done) == blocks:
        os.kill(os.getpid(), signal.SIGKILL)
_block_loop.save_checkpoint = dying
manager = PassManager(parse_pipeline(pipeline), cache=Cache(folder / "cache"))
result = manager.run(serialize.load(folder / "program"), Context(torch.load(folder / "batches.pt")))
print(result.digest(), len(done))
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(family, texts, tmp_path: Path, run_script) -> None:
    """Killed behind the first of two blocks; then behind the first of the next pass; three blocks are left."""
    program, batches = family("llama"), texts(family("llama"))
    pipeline = "quantize{scheme=W3A16},autoround{iterations=5 batch=2},lkd{iterations=5 batch=2}"
    serialize.save(program, tmp_path / "program")
    torch.save(batches, tmp_path / "batches.pt")
    whole = PassManager(parse_pipeline(pipeline)).run(serialize.load(tmp_path / "program"), Context(batches))
    for blocks, code in ((1, -signal.SIGKILL), (2, -signal.SIGKILL), (99, 0)):
        done = run_script(SCRIPT, tmp_path, pipeline, blocks)
        assert done.returncode == code, done.stderr
    assert done.stdout.split() == [whole.digest(), "1"]


def test_the_artifact_is_verified(family, texts, run, tmp_path: Path) -> None:
    reference, batches = family("bert"), texts(family("bert"))
    context = Context(batches, reference=reference)
    passes = (Quantize(Scheme.parse("W8A8")), SHORT, Calibrate(), LowerInteger())
    export(run(reference, *passes, context=context), tmp_path, batches=batches[:1])


def test_values_that_are_not_finite_are_named(family, texts, run) -> None:
    reference = family("llama")
    name = "model.layers.1.input_layernorm.weight"
    broken = get_tensor(reference.module, name).detach().clone()
    broken[0] = torch.nan
    set_tensor(reference.module, name, torch.nn.Parameter(broken))
    placed = run(reference, Quantize(Scheme.parse("W4A16")))
    with pytest.raises(BitlowerError, match=r"model\.layers\.1: its calibration values hold NaN or Inf"):
        run(placed, SHORT, context=Context(texts(reference)))


def test_no_data_is_refused(family, run) -> None:
    with pytest.raises(BitlowerError, match="autoround needs two sequences of calibration data at least, not 0"):
        run(family("llama"), Quantize(Scheme.parse("W4A16")), SHORT)


@pytest.mark.parametrize(
    ("field", "value"),
    [("iterations", 0), ("batch", 0), *(("learning_rate", rate) for rate in (-0.1, 0.0, 1.5)), ("held_out", 0.0)],
)
def test_parameters_out_of_range_are_named(family, run, field: str, value: float) -> None:
    with pytest.raises(BitlowerError, match=f"autoround: {field.replace('_', '-')} is {value}"):
        run(family("llama"), Quantize(Scheme.parse("W4A16")), module.Autoround(**{field: value}))
