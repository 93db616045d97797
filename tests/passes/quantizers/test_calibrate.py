"""Ranges against hooks on the transformers model and numpy in float64; streaming; what is wrong with the data."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import Batch, BitlowerError, Granularity, Program, Scheme, get_tensor, set_tensor
from bitlower.passes import Context
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


def scales(program: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero point of each quantizer, by the path and role of what it rounds."""
    found = {}
    for node, quantizer in program.quantizers():
        assert isinstance(node, fx.Node)
        parts = tuple(get_tensor(program.module, arg.target) for arg in node.args[1:3])
        found[f"{quantizer.role} {quantizer.tensor if node.args[0].op == 'get_attr' else node.meta['path']}"] = parts
    return found


def observed(model: nn.Module, batches: Sequence[Batch]) -> dict[str, list[np.ndarray]]:
    """What each LayerNorm, linear and activation function of the model gives, batch by batch, without padded tokens."""
    kept: dict[str, list[np.ndarray]] = {}
    batch: Batch = {}

    def hook(name: str):
        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            tokens = output[batch["attention_mask"].bool()] if output.dim() == 3 else output
            kept.setdefault(name, []).append(tokens.double().numpy().reshape(-1, output.shape[-1]))

        return keep

    kinds = (nn.LayerNorm, nn.Linear, nn.Tanh)
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds) or name.endswith("intermediate_act_fn")
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return kept


def affine(low: float, high: float, bits: int = 8) -> tuple[float, float]:
    """Scale and zero point of unsigned codes over ``[low, high]`` and zero, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def check(found: tuple[torch.Tensor, torch.Tensor], low: np.ndarray, high: np.ndarray, bits: int = 8) -> None:
    scale, zero = np.vectorize(lambda a, b: affine(a, b, bits))(low, high)
    np.testing.assert_allclose(found[0].reshape(-1), np.reshape(scale, -1), rtol=2e-5)
    assert np.abs(found[1].reshape(-1).numpy() - np.reshape(zero, -1)).max() <= 1


def test_min_max_is_that_of_the_model_without_padding(bert, batches, run) -> None:
    """Weights stay float, so that every value is the model's own."""
    model, program = bert(attention="eager")
    data = batches(3)
    passes = Quantize(Scheme.parse("W16A8-full")), Calibrate(activations="minmax")
    found = scales(run(program, *passes, context=Context(calibration=data)))
    seen = observed(model, data)
    checked = 0
    for key, value in found.items():
        role, _, path = key.partition(" ")
        if role in ("norm", "linear-output", "activation", "logits"):
            low, high = min(part.min() for part in seen[path]), max(part.max() for part in seen[path])
            check(value, np.array([low]), np.array([high]))
            checked += 1
    assert checked == 5 + 2 * 5 + 3 + 1


def test_padding_would_widen_the_ranges(bert, batches, run) -> None:
    """The test above means something: with a mask of ones, the padded tokens change the ranges."""
    _, program = bert()
    data = batches(2, padding=4)
    context, other = Context(calibration=data), Context(calibration=[dict(b) for b in data])
    for batch in other.calibration:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 0, batch["input_ids"])
    quantized = run(program, Quantize(Scheme.parse("W8A8-full")))
    first, second = (scales(run(quantized, Calibrate(), context=c)) for c in (context, other))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=0.0, rtol=1e-5)
    unmasked = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in data]
    third = scales(run(quantized, Calibrate(), context=Context(calibration=unmasked)))
    assert any(not torch.equal(first[key][0], third[key][0]) for key in first if key.startswith("norm "))


def test_the_running_range_is_an_exponential_average(bert, batches, run) -> None:
    model, program = bert(attention="eager")
    data = batches(4)
    pass_ = Calibrate(activations="running-minmax", momentum=0.75)
    found = scales(run(program, Quantize(Scheme.parse("W16A8-full")), pass_, context=Context(calibration=data)))
    for path, parts in observed(model, data).items():
        key = next((k for k in found if k.endswith(f" {path}")), "")
        if not key:
            continue
        ends = [(min(part.min(), 0.0), max(part.max(), 0.0)) for part in parts]
        low, high = ends[0]
        for a, b in ends[1:]:
            low, high = 0.75 * low + 0.25 * a, 0.75 * high + 0.25 * b
        check(found[key], np.array([low]), np.array([high]))


@pytest.mark.parametrize("estimator", ["minmax", "mse", "mse-token", "percentile"])
def test_the_cut_into_batches_does_not_matter(bert, batches, run, estimator: str) -> None:
    _, program = bert()
    whole = batches(1, rows=6, padding=0)
    parts = [{name: value[i : i + 2] for name, value in whole[0].items()} for i in range(0, 6, 2)]
    quantized = run(program, Quantize(Scheme.parse("W8A8-full")))
    pass_ = Calibrate(weights="minmax", activations=estimator, bins=256)
    first, second = (scales(run(quantized, pass_, context=Context(calibration=data))) for data in (whole, parts))
    for key, value in first.items():
        torch.testing.assert_close(value[0], second[key][0], atol=1e-7, rtol=0.02 if estimator != "minmax" else 1e-5)


def test_percentiles_cut_the_tails_of_the_model_s_values(bert, batches, run) -> None:
    model, program = bert(attention="eager")
    data = batches(3)
    pass_ = Calibrate(activations="percentile", percentile=99.0)
    found = scales(run(program, Quantize(Scheme.parse("W16A8-full")), pass_, context=Context(calibration=data)))
    for path, parts in observed(model, data).items():
        values = np.concatenate(parts).reshape(-1)
        if path.endswith("LayerNorm"):
            low, high = np.percentile(values, [1.0, 99.0], method="inverted_cdf")
            scale = float(found[f"norm {path}"][0])
            assert scale == pytest.approx((high - low) / 255, abs=2.1 * np.ptp(values) / 4096 / 255)


@pytest.mark.parametrize("estimator", ["mse", "mse-golden"])
def test_mse_ranges_err_less_than_min_max_on_the_model_s_values(bert, batches, run, estimator: str) -> None:
    model, program = bert(attention="eager")
    data = batches(3)
    quantized = run(program, Quantize(Scheme.parse("W16A3-full")))
    kinds = [Calibrate(activations=kind) for kind in ("minmax", estimator)]
    plain, searched = (scales(run(quantized, kind, context=Context(calibration=data))) for kind in kinds)
    improved = 0
    for path, parts in observed(model, data).items():
        values = np.concatenate(parts).reshape(-1)
        key = next((k for k in plain if k.endswith(f" {path}")), "")
        if key:
            errors = [error(values, *(float(part) for part in found[key]), 7) for found in (plain, searched)]
            assert errors[1] <= errors[0] * 1.001
            improved += errors[1] < 0.99 * errors[0]
    assert improved >= 5


def test_token_ranges_err_less_by_the_measure_of_tokens(bert, batches, run) -> None:
    """Each token's squared error over its own energy; one token of huge norm owns min–max and plain MSE."""
    model, program = bert(attention="eager")
    scaled, data = program.clone(), batches(4, rows=6)
    name = "bert.embeddings.word_embeddings.weight"
    table = get_tensor(program.module, name).detach().clone()
    table[int(data[0]["input_ids"][0, 0])] *= 400
    set_tensor(scaled.module, name, nn.Parameter(table))
    scheme = Scheme(None, None, None, (), (("embedding-sum", Scheme.parse("W16A6").activations),))
    quantized = run(scaled, Quantize(scheme))
    kinds = [Calibrate(activations=kind) for kind in ("minmax", "mse-golden", "mse-token")]
    found = [scales(run(quantized, kind, context=Context(calibration=data))) for kind in kinds]
    embeddings = model.bert.embeddings
    with torch.no_grad():
        sums = [
            (table[b["input_ids"]] + embeddings.token_type_embeddings(b["token_type_ids"]))[b["attention_mask"].bool()]
            for b in data
        ]
    tokens = torch.cat(sums).double().numpy()
    errors = []
    for ranges in found:
        scale, zero = (float(part) for part in next(iter(ranges.values())))
        codes = np.clip(np.rint(tokens / scale) + zero, 0, 63)
        rounded = (codes - zero) * scale
        errors.append((((tokens - rounded) ** 2).sum(1) / (tokens**2).sum(1)).mean())
    assert errors[2] < 0.7 * errors[1]
    assert errors[2] < 0.7 * errors[0]


def error(values: np.ndarray, scale: float, zero: float, top: int) -> float:
    codes = np.clip(np.rint(values / scale) + zero, 0, top)
    return float(((values - (codes - zero) * scale) ** 2).sum())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16-g16", "W4A16-tensor", "W4A16-asym"])
def test_weight_ranges_of_all_granularities(bert, run, scheme: str) -> None:
    """Min–max is numpy's; the searches never err more, scale by scale."""
    _, program = bert()
    quantized = run(program, Quantize(Scheme.parse(scheme)))
    found = {kind: run(quantized, Calibrate(weights=kind)) for kind in ("minmax", "mse", "mse-golden")}
    for node, quantizer in found["minmax"].quantizers():
        weight = get_tensor(program.module, quantizer.tensor).detach().double().numpy()
        parts = {k: [get_tensor(p.module, a.target).numpy() for a in node.args[1:3]] for k, p in found.items()}
        rows, scale = split(weight, parts["minmax"][0])
        asymmetric = not quantizer.spec.grid.symmetric
        limits = (0, 15) if asymmetric else (-8, 7)
        low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
        expected = (high - low) / 15 if asymmetric else np.maximum(-low, high) / 7
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        errors = {k: row_errors(weight, *p, limits) for k, p in parts.items()}
        for kind in ("mse", "mse-golden"):
            assert (errors[kind] <= errors["minmax"] * (1 + 1e-5)).all()
            assert errors[kind].sum() < 0.95 * errors["minmax"].sum()


def split(x: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the elements that share a scale, and the scales."""
    if scale.ndim == 0:
        return x.reshape(1, -1), scale.reshape(1)
    rows, groups = scale.shape
    blocks = x.reshape(rows, x.shape[0] // rows, groups, x.shape[1] // groups)
    return blocks.transpose(0, 2, 1, 3).reshape(rows * groups, -1), scale.reshape(-1)


def row_errors(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    rows, steps = split(x, scale.astype(np.float64))
    _, zeros = split(x, zero.astype(np.float64))
    codes = np.clip(np.rint(rows / steps[:, None]) + zeros[:, None], *limits)
    return ((rows - (codes - zeros[:, None]) * steps[:, None]) ** 2).sum(1)


@pytest.mark.parametrize("granularity", [Granularity.per_embedding_group(4), Granularity.per_embedding()], ids=str)
def test_each_embedding_group_has_its_own_range(bert, batches, run, granularity: Granularity) -> None:
    model, program = bert(attention="eager")
    data = batches(2)
    activations = Scheme.parse("W16A8").activations
    assert activations is not None
    spec = replace(activations, granularity=granularity)
    scheme = Scheme(None, None, None, (), (("norm", spec),))
    for kind in ("minmax", "mse"):
        found = scales(run(program, Quantize(scheme), Calibrate(activations=kind), context=Context(calibration=data)))
        for path, parts in observed(model, data).items():
            if path.endswith("LayerNorm"):
                count = granularity.num_groups or 32
                values = np.concatenate(parts).reshape(-1, count, 32 // count)
                low, high = values.min((0, 2)), values.max((0, 2))
                scale = found[f"norm {path}"][0]
                assert scale.shape == (1, 1, count)
                if kind == "minmax":
                    check(found[f"norm {path}"], low, high)
                assert (scale.reshape(-1).numpy() <= (np.maximum(high, 0) - np.minimum(low, 0)) / 255 * 1.0001).all()


def test_logits_by_cross_entropy_are_never_worse_than_min_max(bert, batches, run) -> None:
    model, program = bert(attention="eager")
    data = batches(4, rows=8)
    quantized = run(program, Quantize(Scheme.parse("W16A3-full")))
    kinds = [Calibrate(activations="minmax", logits=choice) for choice in ("same", "cross-entropy")]
    plain, searched = (scales(run(quantized, kind, context=Context(calibration=data))) for kind in kinds)
    with torch.no_grad():
        logits = torch.cat([model(**batch)["logits"] for batch in data])
    target = torch.softmax(logits.double(), -1)

    def cross_entropy(scale: torch.Tensor, zero: torch.Tensor) -> float:
        rounded = ((logits / scale).round() + zero).clamp(0, 7).sub(zero).mul(scale).double()
        return float(-(target * torch.log_softmax(rounded, -1)).sum())

    assert cross_entropy(*searched["logits classifier"]) <= cross_entropy(*plain["logits classifier"])
    changed = [key for key in plain if not torch.equal(plain[key][0], searched[key][0])]
    assert changed in ([], ["logits classifier"])


def test_cross_entropy_needs_one_scale(bert, batches, run) -> None:
    _, program = bert()
    spec = Scheme.parse("W8A8").activations
    assert spec is not None
    scheme = Scheme(overrides=(("logits", replace(spec, granularity=Granularity.per_embedding())),))
    with pytest.raises(BitlowerError, match="cross-entropy ranges are per tensor: %linear_"):
        run(program, Quantize(scheme), Calibrate(logits="cross-entropy"), context=Context(calibration=batches(1)))


class Stream(Sequence[Batch]):
    """Makes each batch when it is asked for and counts how many are alive at once."""

    def __init__(self, source: list[Batch]) -> None:
        self.source, self.most, self.passes = source, 0, 0
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: object) -> Batch:
        raise AssertionError("batches are to be read in order")

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for batch in self.source:
            fresh = {name: value.clone() for name, value in batch.items()}
            self.alive.append(weakref.ref(fresh["input_ids"]))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            yield fresh


@pytest.mark.parametrize(
    ("estimator", "passes"),
    [("minmax", 1), ("running-minmax", 1), ("mse", 2), ("mse-token", 2), ("percentile", 2)],
)
def test_batches_are_streamed(bert, batches, run, estimator: str, passes: int) -> None:
    """However many there are, two are held at most, and each is read once a statistic."""
    _, program = bert(layers=1)
    data = Stream(batches(6))
    pass_ = Calibrate(weights="minmax", activations=estimator, bins=64)
    run(program, Quantize(Scheme.parse("W8A8-full")), pass_, context=Context(calibration=data))
    assert data.most <= 2
    assert data.passes == passes


@pytest.mark.parametrize("pass_", [Calibrate(), Calibrate(activations="mse-golden", logits="cross-entropy", bins=128)])
def test_two_runs_give_equal_programs(bert, batches, run, pass_: Calibrate) -> None:
    _, program = bert(layers=1)
    quantized = run(program, Quantize(Scheme.parse("W8A8-full")))
    first, second = (run(quantized, pass_, context=Context(calibration=batches(2))) for _ in range(2))
    assert first.digest() == second.digest()


def test_closed_and_dynamic_quantizers_are_left_alone(bert, batches, run) -> None:
    _, program = bert(layers=1)
    once = run(program, Quantize(), Calibrate(), context=Context(calibration=batches(2)))
    again = once.clone()
    assert Calibrate().run(again, Context(calibration=batches(2, seed=9))) is False
    assert again.digest() == once.digest()
    dynamic = run(program, Quantize(Scheme.parse("W8A8-token")), Calibrate())
    parts = [node.args[1] for node, _ in dynamic.quantizers() if node.args[1].op == "get_attr"]
    assert parts
    assert all(bool(get_tensor(dynamic.module, part.target).any()) for part in parts)


def test_activations_without_data_are_an_error(bert, run) -> None:
    _, program = bert(layers=1)
    with pytest.raises(BitlowerError, match="6 activation quantizers need calibration data; give calibration batches"):
        run(program, Quantize(), Calibrate())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("estimator", ["minmax", "mse", "mse-golden"])
def test_a_weight_that_is_not_finite_is_named(bert, run, bad: float, estimator: str) -> None:
    _, program = bert(layers=1)
    broken = program.clone()
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = get_tensor(broken.module, name).detach().clone()
    weight[3, 5] = bad
    set_tensor(broken.module, name, nn.Parameter(weight))
    with pytest.raises(BitlowerError, match=rf"the weight {name} holds NaN or Inf"):
        run(broken, Quantize(Scheme.parse("W8A16")), Calibrate(weights=estimator))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sqrt(self.first(x)))


@pytest.mark.parametrize("estimator", ["minmax", "running-minmax", "mse"])
def test_an_activation_that_is_not_finite_is_named(run, estimator: str) -> None:
    program = load(Root(), example_inputs={"x": torch.randn(3, 4)})
    context = Context(calibration=[{"x": torch.randn(3, 4)}])
    with pytest.raises(BitlowerError, match=r"the activation sqrt holds NaN or Inf: %sqrt .*test_calibrate\.py"):
        run(program, Quantize(), Calibrate(activations=estimator), context=context)


def test_nan_in_the_data_is_named(run) -> None:
    program = load(nn.Sequential(nn.Linear(4, 4)), example_inputs={"input": torch.randn(3, 4)})
    context = Context(calibration=[{"input": torch.tensor([[1.0, 2.0, float("nan"), 0.0]])}])
    with pytest.raises(BitlowerError, match="the activation input_1 holds NaN or Inf"):
        run(program, Quantize(), Calibrate(), context=context)


def test_values_of_zero_only_are_safe(run) -> None:
    program = load(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), example_inputs={"input": torch.randn(3, 4)}
    )
    for name, tensor in list(program.tensors()):
        set_tensor(program.module, name.removeprefix("model/"), nn.Parameter(torch.zeros_like(tensor)))
    for kind in ("minmax", "running-minmax", "percentile", "mse", "mse-golden", "mse-token"):
        context = Context(calibration=[{"input": torch.zeros(2, 4)}])
        result = run(program, Quantize(), Calibrate(weights="mse", activations=kind), context=context)
        assert torch.equal(result(input=torch.zeros(1, 4))["output"], torch.zeros(1, 2))


def test_a_batch_of_padding_only_is_no_error(bert, batches, run) -> None:
    _, program = bert(layers=1)
    (batch,) = batches(1)
    data = [batch, {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}]
    quantized = run(program, Quantize(Scheme.parse("W8A8-full")))
    result = run(quantized, Calibrate(activations="mse", bins=64), context=Context(calibration=data))
    assert bool(torch.isfinite(result(**batch)["logits"]).all())
