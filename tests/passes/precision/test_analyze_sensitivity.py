"""Sensitivity: a planted culprit is found, losses are those of full runs, and the recipe does what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from bitlower.ir import Batch, BitlowerError, Program, Scheme, get_tensor, ops, set_tensor
from bitlower.passes import Context, PassManager, make_pass, parse_pipeline
from bitlower.passes.precision._measures import Measure
from bitlower.passes.precision.analyze_sensitivity import AnalyzeSensitivity, SensitivityReport, analyze, raise_roles
from bitlower.tools.recipes.recipe import load_recipe, validate_recipe


@pytest.fixture(scope="module")
def calibrated(bert, batches) -> tuple[Program, list[Batch]]:
    """A classifier in 8 bits, in which the residual sums have far too few bits."""
    _, program = bert(layers=2, labels=3)
    long = Scheme.parse("W8A8-full").to_dict()
    coarse = {"num_bits": 2, "type": "uint", "symmetric": False, "strategy": "tensor"}
    quantize = make_pass("quantize", {"scheme": long | {"overrides": {"residual": coarse}}})
    passes = (make_pass("clean"), quantize, make_pass("calibrate", {"activations": "minmax"}))
    data = batches(3)
    return PassManager(passes).run(program, Context(calibration=data)), data


@pytest.fixture(scope="module")
def report(calibrated) -> SensitivityReport:
    program, data = calibrated
    context = Context(calibration=data)
    PassManager([AnalyzeSensitivity()]).run(program, context)
    return context[SensitivityReport]


def loss_without(program: Program, data: list[Batch], role: str) -> float:
    """The KL divergence of the program's logits with the quantizers of ``role`` off, by full runs."""

    def off(roles: set[str]) -> Program:
        copy = program.clone()
        for node in copy.graph.find_nodes(op="call_function", target=ops.fake_quantize):
            if node.meta["quantizer"].role in roles:
                node.kwargs = {"calibrated": False}
        copy.recompile()
        return copy

    everything = {quantizer.role for _, quantizer in program.quantizers()}
    measure = Measure("kl", ("logits",))
    with torch.no_grad():
        pairs = [[off(roles)(**batch)["logits"] for roles in (everything, {role})] for batch in data]
    return measure.total([measure.compare([a], [b], batch) for (a, b), batch in zip(pairs, data, strict=True)])


def test_the_culprit_comes_first(report: SensitivityReport) -> None:
    roles = [group for group in report.groups if group.by == "role"]
    assert roles[0].role == "residual"
    assert max(roles, key=lambda group: group.one_in).role == "residual"
    assert report.raised == ("residual",)
    assert report.excluded == ()
    assert (report.lifted, report.measure, report.outputs, report.batches) == (4, "kl", ("logits",), 3)
    assert report.remaining <= 0.1 * report.full


def test_losses_are_those_of_full_runs(calibrated, report: SensitivityReport) -> None:
    program, data = calibrated
    for role in ("residual", "norm", "linear-weight"):
        [group] = [g for g in report.groups if g.by == "role" and g.role == role]
        assert group.leave_one_out == loss_without(program, data, role)
        assert group.gain == report.full - group.leave_one_out
    assert report.full == loss_without(program, data, "nothing")


def test_the_recipe_is_valid_and_lowers_the_loss(calibrated, report: SensitivityReport, bert, tmp_path: Path) -> None:
    _, data = calibrated
    (tmp_path / "model").mkdir()
    (tmp_path / "texts.txt").write_text("a text\n")
    head = "model: {path: model}\ncalibration: {data: texts.txt}\n"
    (tmp_path / "recipe.yaml").write_text(head + report.recipe + "export: [onnx-qdq]\n")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    passes = validate_recipe(recipe)
    assert [p.name for p in passes] == ["clean", "quantize", "calibrate", "lower-integer"]
    assert passes[1].scheme.spec("residual").grid.bits == 16
    assert passes[1].scheme.spec("norm") == Scheme.parse("W8A8-full").spec("norm")

    made = PassManager(passes[:-1]).run(bert(layers=2, labels=3)[1], Context(calibration=data))
    context = Context(calibration=data)
    PassManager([AnalyzeSensitivity(by=("role",))]).run(made, context)
    assert context[SensitivityReport].full == pytest.approx(report.remaining, rel=0.5)
    assert [*report.details()][-len(report.recipe.splitlines()) :] == report.recipe.splitlines()


def test_a_layer_is_excluded_where_that_gives_more(calibrated) -> None:
    """Of two layers one has coarse values of all roles."""
    program, data = calibrated
    copy = program.clone()
    for node in copy.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        name = node.args[1].target
        if node.args[0].op != "get_attr" and ".layer.1." in node.meta["path"]:
            set_tensor(copy.module, name, get_tensor(program.module, name) * 40)
        elif node.meta["quantizer"].role == "residual":
            set_tensor(copy.module, name, get_tensor(program.module, name) * 0)
    residuals = [
        n for n, q in copy.quantizers() if q.role == "residual" and not get_tensor(copy.module, n.args[1].target).any()
    ]
    for node in residuals:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)
    copy.recompile()
    report = analyze(copy, AnalyzeSensitivity(limit=0.6), Context(calibration=data))
    assert report.excluded == ("bert.encoder.layer.1",)
    assert '"bert.encoder.layer.1"' in report.recipe
    assert report.remaining < 0.1 * report.full


def test_nothing_may_be_lifted(calibrated) -> None:
    program, data = calibrated
    report = analyze(program, AnalyzeSensitivity(by=("role",), limit=0.0), Context(calibration=data))
    assert (report.raised, report.excluded, report.recipe, report.remaining) == ((), (), "", report.full)
    assert "nothing to raise" in report.summary()


@pytest.mark.parametrize("measure", ["sqnr", "disagreement"])
def test_other_measures(calibrated, measure: str) -> None:
    program, data = calibrated
    context = Context(calibration=data)
    text = f"analyze-sensitivity{{measure={measure} by=[role] batches=1}}"
    PassManager(parse_pipeline(text)).run(program, context)
    report = context[SensitivityReport]
    assert (report.measure, report.batches) == (measure, 1)
    headers, rows = report.table()
    assert len(rows) == 12
    assert all(len(row) == len(headers) for row in rows)
    assert ("dB" in rows[0][2]) == (measure == "sqnr")
    assert all(0 <= group.one_in < math.inf for group in report.groups)


def test_the_report_survives_the_cache(report: SensitivityReport) -> None:
    adapter = TypeAdapter(SensitivityReport)
    assert adapter.validate_python(adapter.dump_python(report, mode="json")) == report


def test_the_program_stays_and_the_result_is_the_same_again(calibrated, report: SensitivityReport) -> None:
    program, data = calibrated
    before, context = program.digest(), Context(calibration=data)
    assert PassManager([AnalyzeSensitivity()]).run(program, context).digest() == before
    assert context[SensitivityReport] == report


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"batches": 0}, "'batches' takes int of 1 or more or none"),
        ({"recover": 2.0}, "'recover' takes float from 0 to 1"),
        ({"by": []}, "'by' takes list of .* of 1 items or more"),
        ({"outputs": ["hidden"]}, "no output 'hidden'"),
    ],
)
def test_wrong_parameters(calibrated, parameters: dict[str, object], message: str) -> None:
    program, data = calibrated
    with pytest.raises(BitlowerError, match=message):
        make_pass("analyze-sensitivity", parameters).run(program, Context(calibration=data))


def test_it_needs_data_and_ranges(calibrated, bert, run) -> None:
    program, data = calibrated
    with pytest.raises(BitlowerError, match="calibration data"):
        AnalyzeSensitivity().run(program, Context())
    opened = run(bert(layers=2, labels=3)[1], make_pass("quantize", {"scheme": "W8A8"}))
    with pytest.raises(BitlowerError, match="has no range"):
        AnalyzeSensitivity().run(opened, Context(calibration=data))


def test_roles_are_raised() -> None:
    scheme = raise_roles(Scheme.parse("W4A8-full"), ["linear-weight", "residual", "linear-input"])
    assert [scheme.spec(role).grid.bits for role in ("linear-weight", "residual", "norm")] == [8, 16, 8]
    assert scheme.spec("linear-input") is None
    assert raise_roles(Scheme.parse("W8A8"), ["linear-weight"]).spec("linear-weight").grid.bits == 16
