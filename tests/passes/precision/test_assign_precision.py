"""Bits: the published set, budgets that are kept, optimality against all assignments, and what later passes take."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import TypeAdapter

from bitlower.frontends import load
from bitlower.ir import Batch, BitlowerError, Level, Program, ops
from bitlower.passes import Context, PassManager, make_pass, parse_pipeline
from bitlower.passes.precision._items import (
    elements,
    find_items,
    float_bytes,
    is_weight,
    roundings,
    set_width,
    stored_bytes,
)
from bitlower.passes.precision._measures import Measure
from bitlower.passes.precision._roofline import TARGETS, Roofline
from bitlower.passes.precision._search import Budgets, Search, refine
from bitlower.passes.precision._time import time_of
from bitlower.passes.precision._trials import Trials
from bitlower.passes.precision.assign_precision import AssignPrecision, PrecisionReport
from bitlower.passes.quantizers.calibrate import Calibrate

MINMAX = Calibrate(weights="minmax", activations="minmax")


def place(program: Program, scheme: str) -> Program:
    return PassManager(parse_pipeline(f"clean,quantize{{scheme={scheme}}}")).run(program, Context())


def assign(program: Program, data: list[Batch], **parameters: object) -> tuple[Program, PrecisionReport]:
    """With ranges from end to end, which are found fastest."""
    context, quick = Context(calibration=data), {"weights": "minmax", "activations": "minmax"}
    result = PassManager([make_pass("assign-precision", quick | parameters)]).run(program, context)
    return result, context[PrecisionReport]


def bits(program: Program, *, weights: bool) -> list[int]:
    return [q.spec.grid.bits for node, q in program.quantizers() if is_weight(node) == weights]


# Budgets


@pytest.fixture(scope="module")
def model(bert, batches) -> tuple[Program, list[Batch]]:
    return bert(layers=1, labels=3)[1], batches(2)


@pytest.mark.parametrize("budget", [3.0, 4.0, 5.5])
def test_average_bits_of_weights(model, budget: float) -> None:
    program, data = model
    result, report = assign(place(program, "W8A8"), data, **{"weight-bits": budget, "front": 0})
    sizes = [(elements(node), q.spec.grid.bits) for node, q in result.quantizers() if is_weight(node)]
    used = sum(n * b for n, b in sizes) / sum(n for n, _ in sizes)
    assert used <= budget
    assert report.budgets[0].used == pytest.approx(used)
    assert used > budget - 1
    assert set(bits(result, weights=False)) == {8}
    assert {b for _, b in sizes} <= {2, 3, 4, 6, 8, 16}


def test_bytes_of_the_model(model) -> None:
    program, data = model
    placed = place(program, "W8A8-full")
    result, report = assign(placed, data, **{"model-bytes": 26_000, "front": 0, "rounds": 0})
    used = float_bytes(result) + sum(
        stored_bytes(node, q.spec.grid.bits) for node, q in result.quantizers() if is_weight(node)
    )
    assert used == report.budgets[0].used <= 26_000
    assert used > 25_000


def test_share_of_16_bits(model) -> None:
    program, data = model
    result, report = assign(place(program, "W8A6-full"), data, **{"share-16": 0.3, "front": 0})
    found = bits(result, weights=False)
    assert set(found) == {6, 16}
    assert 0.2 < found.count(16) / len(found) <= 0.3
    assert report.optimum is not None
    assert report.measured is not None
    assert report.measured <= report.optimum.measured


def test_several_budgets_hold_at_once(model) -> None:
    program, data = model
    budgets = {"weight-bits": 4, "activation-bits": 6, "share-16": 0.1}
    result, report = assign(place(program, "W8A8-full"), data, **budgets, front=0, rounds=0)
    found = bits(result, weights=False)
    assert sum(found) / len(found) <= 6
    assert found.count(16) <= 0.1 * len(found)
    assert [use.name for use in report.budgets] == list(budgets)
    assert all(use.used <= use.most for use in report.budgets)


def test_the_sum_of_losses_is_the_least_of_all_assignments(model) -> None:
    """Every assignment of 2, 4 or 8 bits to six of the weights, tried out on losses measured by trials of one each."""
    program, data = model
    placed = PassManager(parse_pipeline("clean,quantize{scheme=W8A16 ignore=[bert.pooler classifier]}")).run(
        program, Context()
    )
    widths = (2, 4, 8)
    _, report = assign(placed, data, bits=list(widths), **{"weight-bits": 4.5, "rounds": 0, "front": 0})
    items = find_items(placed, widths, (), keep=False)
    assert len(items) == len(report.rows) == 4
    trials = Trials(placed, data, Measure.choose(placed, "auto"))
    nodes = [node for item in items for node in item.nodes]
    grids = {width: roundings(placed, nodes, width, MINMAX, data) for width in widths}
    settings = [{n: grids[w][n] for n in item.nodes} for item in items for w in widths]
    flat = trials.run(settings, baseline=trials.off)
    losses = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    size = sum(item.bits_cost(1) for item in items)
    best = min(
        sum(row[c] for row, c in zip(losses, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(items))
        if sum(i.bits_cost(widths[c]) for i, c in zip(items, choice, strict=True)) <= 4.5 * size
    )
    assert report.optimum is not None
    assert report.optimum.predicted == pytest.approx(best, rel=1e-9)
    assert report.optimum.bound <= best * (1 + 1e-9)
    assert report.optimum.greedy is None or report.optimum.greedy >= best * (1 - 1e-9)


def test_what_is_measured_is_the_loss_of_the_calibrated_program(model) -> None:
    """The program that `calibrate` makes of the result, run as it is."""
    program, data = model
    result, report = assign(place(program, "W8A8-full"), data, **{"weight-bits": 4, "share-16": 0.2, "front": 0})
    closed = PassManager([MINMAX]).run(result, Context(calibration=data))
    measure = Measure.choose(program, "auto")
    with torch.no_grad():
        outputs = [[p(**batch)["logits"] for p in (program, closed)] for batch in data]
    sums = [measure.compare([a], [b], batch) for (a, b), batch in zip(outputs, data, strict=True)]
    assert report.measured == pytest.approx(measure.total(sums), rel=1e-6)
    assert report.measured == Trials(closed, data, measure).run([{}])[0]


def test_refinement_never_makes_it_worse(model) -> None:
    program, data = model
    _, report = assign(place(program, "W4A4-full"), data, **{"share-16": 0.4, "rounds": 3, "front": 0})
    assert report.optimum is not None
    assert report.measured is not None
    kept = [r.measured for r in report.rounds if r.accepted]
    assert [report.optimum.measured, *kept] == sorted([report.optimum.measured, *kept], reverse=True)
    assert report.measured == ([report.optimum.measured, *kept])[-1]


@pytest.mark.parametrize(
    ("measured", "elsewhere", "kept"), [(0.7, 0.5, True), (0.7, 1.5, False), (0.8, 0.5, False), (1.1, 0.5, False)]
)
def test_what_a_step_of_refinement_has_to_bring(measured: float, elsewhere: float, kept: bool) -> None:
    """One item, for which another width promises a gain of 1: a quarter of it at least, and some on other batches."""

    class Found:
        def around(self, choice: tuple[int, ...]) -> list[list[float]]:
            return [[2.0, 1.0]]

        def judged(self, choice: tuple[int, ...]) -> tuple[float, float]:
            return (1.0, 1.0) if choice == (0,) else (measured, elsewhere)

    choice, loss, rounds = refine(Found(), (0,), 1.0, [], 1)
    assert (choice, loss) == (((1,), measured) if kept else ((0,), 1.0))
    assert [(r.changed, r.predicted, r.measured, r.accepted) for r in rounds] == [(1, 0.0, measured, kept)]


def test_proposals_and_judgement_are_on_different_batches(bert, batches) -> None:
    placed, data = place(bert(layers=1, labels=3)[1], "W8A8"), batches(3)
    items = find_items(placed, (4, 8), (), keep=False)
    options = AssignPrecision(share_16=0.5, weights="minmax")._options()
    found = Search(placed, items, options, MINMAX, Context(calibration=data))
    assert [trials.batches for trials in (found.trials, found.near, found.judge)] == [
        tuple(data), (data[0], data[2]), (data[1],),
    ]  # fmt: skip
    choice = (0,) * len(items)
    assert found.judged(choice)[0] == found.measure([choice])[0]
    options = AssignPrecision(share_16=0.5, batches=1)._options()
    alone = Search(placed, items, options, MINMAX, Context(calibration=data))
    assert alone.near is alone.judge is alone.trials
    loss, judged = alone.judged(choice)
    assert loss == judged


# Time

HOST = {"name": "host", "bandwidth": 4e8, "float-bytes": 4, "rates": {"W16A16": 4e9, "W4A8": 6e9, "W8A8": 9e9}}


def test_a_share_of_the_time(model) -> None:
    """Every assignment of 4, 8 or 16 bits to weights and inputs of two linears, as programs that have these bits."""
    program, data = model
    layer = "bert.encoder.layer.0."
    scheme = f"clean,quantize{{scheme=W8A8 targets=[{layer}output.dense {layer}intermediate.dense]}}"
    placed = PassManager(parse_pipeline(scheme)).run(program, Context())
    widths, target = (4, 8, 16), Roofline.from_dict(HOST)
    _, report = assign(
        placed, data, bits=list(widths), time=1.01, target=HOST, rows=16, rounds=0, front=4,
    )  # fmt: skip
    items = find_items(placed, *Budgets(time=1.01).widths(widths))
    assert [item.widths for item in items if item.is_weight] == [(4, 8, 16)] * 2
    assert [item.widths for item in items if not item.is_weight] == [(8, 16)] * 2
    trials = Trials(placed, data, Measure.choose(placed, "auto"))
    grids = {
        (node, w): rounding
        for w in widths
        for node, rounding in roundings(
            placed, [n for i in items if w in i.widths for n in i.nodes], w, MINMAX, data
        ).items()
    }
    flat = iter(trials.run([{n: grids[n, w] for n in i.nodes} for i in items for w in i.widths], baseline=trials.off))
    losses = [[next(flat) for _ in item.widths] for item in items]
    before, found = time_of(placed, [], target, 16, 1.0).before, []
    for choice in itertools.product(*(range(len(item.widths)) for item in items)):
        made = placed.clone()
        names = {node.name: node for node, _ in made.quantizers()}
        for item, c in zip(items, choice, strict=True):
            for node in item.nodes:
                set_width(names[node.name], item.widths[c])
        share = time_of(made, [], target, 16, 1.0).before / before
        if share <= 1.01:
            found.append((sum(row[c] for row, c in zip(losses, choice, strict=True)), share))
    assert report.optimum is not None
    assert 1 < len(found) < 36
    assert report.optimum.predicted == pytest.approx(min(found)[0], rel=1e-9)
    assert report.optimum.bound <= min(found)[0] * (1 + 1e-9)
    assert report.time is not None
    assert report.time.before_us == pytest.approx(before / 1e6)
    assert report.time.after_us == pytest.approx(report.budgets[0].used * before / 1e6)
    assert report.budgets[0].used <= 1.01
    assert report.front[0].budget == pytest.approx(min(s for _, s in [*found]), rel=1e-9)
    assert [p.predicted for p in report.front] == sorted((p.predicted for p in report.front), reverse=True)
    assert "by calculation" in report.text()
    assert "by calculation" in report.front_table()[0][0]
    assert "estimated by calculation" in next(iter(report.charts())).across


def test_time_beside_other_budgets(model) -> None:
    program, data = model
    budgets = {"weight-bits": 6, "share-16": 0.2, "time": 0.9}
    placed = place(program, "W8A8-full")
    result, report = assign(placed, data, **budgets, target="a100", rows=4, front=0, rounds=1)
    assert [use.name for use in report.budgets] == list(budgets)
    assert all(use.used <= use.most for use in report.budgets)
    target = TARGETS["a100"]
    share = time_of(result, [], target, 4, 1.0).before / time_of(placed, [], target, 4, 1.0).before
    assert report.budgets[2].used == pytest.approx(share)
    assert set(bits(result, weights=False)) <= {8, 16}


# The front


@pytest.fixture(scope="module")
def front(model) -> PrecisionReport:
    program, data = model
    return assign(place(program, "W8A8"), data, **{"weight-bits": 4, "rounds": 0, "front": 6, "measured": 2})[1]


def test_the_front_falls(front: PrecisionReport) -> None:
    assert len(front.front) == 6
    losses = [point.predicted for point in front.front]
    assert losses == sorted(losses, reverse=True)
    assert all(point.used <= point.budget for point in front.front)
    assert front.front[0].budget == 2.0
    assert [point.measured is not None for point in front.front] == [True, *[False] * 4, True]


def test_the_front_is_a_chart(front: PrecisionReport) -> None:
    [chart] = front.charts()
    predicted, measured = chart.lines.values()
    assert predicted == tuple((point.budget, point.predicted) for point in front.front)
    assert [x for x, _ in measured] == [front.front[0].budget, front.front[-1].budget]
    assert chart.chosen == (front.budgets[0].most, front.measured)
    assert list(PrecisionReport(()).charts()) == []


def test_the_report_survives_the_cache(front: PrecisionReport) -> None:
    adapter = TypeAdapter(PrecisionReport)
    assert adapter.validate_python(adapter.dump_python(front, mode="json")) == front
    for headers, rows in (front.table(), front.front_table()):
        assert all(len(row) == len(headers) for row in rows)
    assert math.isfinite(front.measured or math.nan)


# Later passes


def test_a_mixed_program_is_lowered_and_exported(model, tmp_path) -> None:
    from bitlower.backends import onnx_qdq

    program, data = model
    assigned = "assign-precision{weight-bits=5 share-16=0.2 front=0 activations=minmax}"
    text = f"clean,quantize{{scheme=W8A8-full}},{assigned},calibrate,lower-integer"
    result = PassManager(parse_pipeline(text)).run(program, Context(calibration=data))
    assert result.level is Level.INTEGER
    assert {q.spec.grid.bits for _, q in result.quantizers()} >= {8, 16}
    assert not result.graph.find_nodes(op="call_function", target=ops.fake_quantize)
    onnx_qdq.export(result, tmp_path, batches=data)
    assert (tmp_path / "model.onnx").is_file()


def test_gptq_takes_mixed_bits(run) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    program = load(LlamaForCausalLM(config).eval(), task="text-generation")
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12).expand(2, 12)}]
    text = "clean,quantize{scheme=W4A16-g16-asym},assign-precision{weight-bits=3.5 front=0},gptq,lower-integer"
    result = PassManager(parse_pipeline(text)).run(program, Context(calibration=data))
    assert len(set(bits(result, weights=True))) > 1


# What is refused


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs a budget"),
        ({"set": "paper", "weight-bits": 4}, "takes no budget"),
        ({"weight-bits": 4, "bits": [1, 2]}, "'bits' takes int from 2 to 16"),
        ({"share-16": 1.5}, "'share-16' takes float from 0 to 1"),
        ({"weight-bits": 1.0}, "no assignment has weight-bits of at most 1"),
        ({"weight-bits": 2, "time": 0.4, "target": "a100"}, "no assignment has time of at most 0.4"),
        ({"model-bytes": 10}, "what stays float takes"),
        ({"weight-bits": 4, "rounds": -1}, "'rounds' takes int of 0 or more"),
        ({"activation-bits": 4.0}, "no quantizer that activation-bits could bound"),
        ({"set": "paper"}, "feed-forward"),
        ({"time": 0.9}, "time and target together"),
        ({"target": "a100", "weight-bits": 4}, "time and target together"),
        ({"time": 0.9, "target": "a100", "rows": 0}, "'rows' takes int of 1 or more"),
        ({"time": 0.1, "target": "a100"}, "no assignment has time"),
    ],
)
def test_wrong_parameters(model, parameters: dict[str, object], message: str) -> None:
    program, data = model
    with pytest.raises(BitlowerError, match=message):
        assign(place(program, "W8A16"), data, **parameters)


def test_the_least_budget_is_said(model) -> None:
    program, data = model
    with pytest.raises(BitlowerError) as caught:
        assign(place(program, "W8A16"), data, **{"weight-bits": 1.5, "bits": [3, 4]})
    assert caught.value.hint.startswith("the least is 3;")


def test_it_stands_before_calibrate_and_needs_data(model) -> None:
    program, data = model
    placed = place(program, "W8A8")
    with pytest.raises(BitlowerError, match="calibration data"):
        assign(placed, [], **{"weight-bits": 4})
    closed = PassManager([MINMAX]).run(placed, Context(calibration=data))
    with pytest.raises(BitlowerError, match="stands before"):
        assign(closed, data, **{"weight-bits": 4})
