"""Results of analyses and searches: told on the way, written into the artifact, equal in every run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitlower.ir import Program
from bitlower.passes import Context, Report, known_passes, make_pass
from bitlower.passes._machinery.report import MOST_LINES, few
from bitlower.passes.quantizers.quantize import PlacementReport, PlacementRow
from bitlower.tools.planning.plan import KEPT, plan_recipe
from bitlower.tools.recipes.recipe import PassStep, Recipe, load_recipe
from bitlower.tools.render import Display
from bitlower.tools.runs.flow import RunOptions, run_recipe, standard_recipe
from bitlower.tools.runs.reports import Reports

PASSES = (
    "clean",
    ("quantize", {"scheme": "W8A6-full"}),
    ("assign-precision", {"share-16": 0.2, "rounds": 0, "front": 2, "activations": "minmax"}),
    ("calibrate", {"activations": "minmax"}),
    ("analyze-sensitivity", {"by": ["role"], "batches": 1}),
    "lower-integer",
)


def recipe_with(bert: Path, texts: Path, passes: tuple[object, ...]) -> Recipe:
    steps = [PassStep(name=p, params={}) if isinstance(p, str) else PassStep(name=p[0], params=p[1]) for p in passes]
    return standard_recipe(str(bert), "W8A8", str(texts)).model_copy(update={"passes": steps})


def test_results_are_told_and_written(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(bert, texts, PASSES)
    run_recipe(recipe, tmp_path / "out", RunOptions(cache=tmp_path / "cache", display=Display()))
    told = capsys.readouterr().err
    assert "assign-precision: " in told
    assert "share-16" in told
    fragment = "passes:" + told.partition("analyze-sensitivity: ")[2].partition("passes:")[2].partition("\n\n")[0]
    assert "overrides" in fragment
    sensitivity = json.loads((tmp_path / "out" / "reports" / "analyze-sensitivity.json").read_text())
    assert all(line in told for line in sensitivity["recipe"].splitlines())
    head = f"model: {{path: {bert}}}\ncalibration: {{data: {texts}}}\n"
    (tmp_path / "again.yaml").write_text(head + sensitivity["recipe"] + "export: [onnx-qdq]\n")
    assert [p.name for p in load_recipe(tmp_path / "again.yaml").build_passes()] == [
        "clean", "quantize", "assign-precision", "calibrate", "lower-integer",
    ]  # fmt: skip
    folder = tmp_path / "out" / "reports"
    assert (folder / "assign-precision.svg").read_text().startswith("<svg")
    assert json.loads((folder / "assign-precision.json").read_text())["budgets"][0]["name"] == "share-16"

    run_recipe(recipe, tmp_path / "second", RunOptions(cache=tmp_path / "cache", display=Display()))  # from the cache
    for name in ("assign-precision.json", "assign-precision.svg", "analyze-sensitivity.json"):
        first, second = (tmp_path / folder / "reports" / name for folder in ("out", "second"))
        assert second.read_bytes() == first.read_bytes()


def test_every_pass_that_leaves_a_report_writes_a_file(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = (
        "clean", "analyze-outliers", ("peg-permute", {"groups": 2}), ("quantize", {"scheme": "W8A8-peg2"}),
        ("adaround", {"iterations": 2}), ("calibrate", {"activations": "minmax"}), "correct-bias", "legalize",
        "lower-integer", "fuse",
    )  # fmt: skip
    options = RunOptions(cache=tmp_path / "cache", display=Display())
    run_recipe(recipe_with(bert, texts, passes), tmp_path / "out", options)
    told, folder = capsys.readouterr().err, tmp_path / "out" / "reports"
    expected = {"clean", "analyze-outliers", "peg-permute", "quantize", "adaround", "correct-bias", "legalize", "fuse"}
    assert {path.stem for path in folder.glob("*.json")} == expected | {"tensors"}
    for name in expected:
        summary = json.loads((folder / f"{name}.json").read_text())["summary"]
        assert "\n" not in summary
        assert f"{name}: {summary}" in told


def test_steps_of_one_name_have_files_of_their_own_and_an_update_has_none() -> None:
    told: list[str] = []
    reports, context = Reports(told.append), Context()
    for scheme, name in (("one", "quantize"), ("two", "quantize"), ("two, other bits", "assign-precision")):
        pass_ = make_pass(name, {"set": "paper"} if name == "assign-precision" else {})
        reports.before(pass_, None, context)  # type: ignore[arg-type]
        context.put(PlacementReport((PlacementRow("x", "input", "", scheme, ""),)))
        reports.after(pass_, None, context, True)  # type: ignore[arg-type]
    specs = {name: json.loads(text)["rows"][0]["spec"] for name, text in reports.files.items()}
    assert specs == {"reports/quantize.json": "one", "reports/quantize-2.json": "two, other bits"}
    assert [line.partition(":")[0] for line in told] == ["quantize", "quantize"]


def test_whatever_is_called_a_report_is_one() -> None:
    known_passes()
    found = {
        cls
        for name, module in [*sys.modules.items()]
        if name.startswith("bitlower.passes.")
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__name__.endswith("Report") and cls.__module__ == name
    }
    assert len(found) > 15
    assert all(issubclass(cls, Report) for cls in found)


def test_few_lines_say_how_many_more_there_are() -> None:
    assert few(map(str, range(MOST_LINES))) == [str(number) for number in range(MOST_LINES)]
    assert few(map(str, range(MOST_LINES + 3)))[-2:] == [str(MOST_LINES - 1), "and 3 more"]


def test_a_plan_knows_a_fixed_set_and_says_what_it_does_not_know(bert: Path, texts: Path) -> None:
    fixed = (*PASSES[:2], ("assign-precision", {"set": "paper"}), "calibrate", "lower-integer")
    plan = plan_recipe(recipe_with(bert, texts, fixed))
    wide = [value for value in plan.activations if value.spec.startswith("u16")]
    assert len(wide) == 3 * len({value.path for value in wide if value.role == "residual"})
    assert plan.notes == (KEPT,)
    searched = plan_recipe(recipe_with(bert, texts, PASSES))
    assert any("assign-precision needs data" in note for note in searched.notes)


def test_backends_are_asked_again_when_bits_change(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    asked: list[set[int]] = []

    def check(self: object, program: Program) -> None:
        asked.append({quantizer.spec.grid.bits for _, quantizer in program.quantizers()})

    backend.replace(check_fits=check)
    steps = (*PASSES[:2], ("assign-precision", {"set": "paper"}), "calibrate", "lower-integer")
    run_recipe(recipe_with(bert, texts, steps), tmp_path / "out", RunOptions(cache=None))
    assert asked == [{6, 8}, {6, 8, 16}]


def test_numbers_that_json_lacks_are_none() -> None:
    from bitlower.passes.precision._report import FrontPoint, PrecisionReport

    told: list[str] = []
    reports, context = Reports(told.append), Context()
    pass_ = make_pass("assign-precision", {"set": "paper"})
    reports.before(pass_, None, context)  # type: ignore[arg-type]
    context.put(PrecisionReport((), front=(FrontPoint(1.0, 1.0, math.inf, None),)))
    reports.after(pass_, None, context, True)  # type: ignore[arg-type]
    assert json.loads(reports.files["reports/assign-precision.json"])["front"][0]["predicted"] is None
    assert len(told) == 1
