"""Why tensors have their bits: what is said agrees with the artifact's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitlower.ir import BitlowerError, CheckError, QuantSpec
from bitlower.tools.cli import main
from bitlower.tools.explain import explain
from bitlower.tools.recipes.recipe import Recipe
from bitlower.tools.runs.flow import run_recipe

QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def artifact(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder: its pooler in float, the bits of the others searched for, and what they cost measured."""
    folder = tmp_path_factory.mktemp("explain")
    words = ("cat", "dog", "bird", "house", "river")
    (folder / "texts.txt").write_text(
        "\n".join(f"the {a} runs {b} under {c}" for a in words for b in words for c in words)
    )
    form = {
        "model": {"path": str(bert)},
        "calibration": {"data": str(folder / "texts.txt"), "samples": 16},
        "passes": [
            "clean",
            {"quantize": {"scheme": "W8A8", "ignore": ["pooler"]}},
            {"assign-precision": {"bits": [4, 8], "weight-bits": 6.0, "rounds": 0, "front": 0}},
            "calibrate",
            "analyze-sensitivity",
            "lower-integer",
        ],
        "export": ["onnx-qdq"],
    }
    run_recipe(Recipe.model_validate(form), folder / "out")
    return folder / "out"


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_every_tensor_has_the_spec_that_the_manifest_says(artifact: Path) -> None:
    rows = {row.tensor: row for row in explain(str(artifact))}
    quantized = {row["tensor"]: QuantSpec.from_dict(row["spec"]) for row in read(artifact, "manifest.json")["tensors"]}
    assert {name for name, row in rows.items() if row.spec} >= set(quantized)
    for name, spec in quantized.items():
        assert (rows[name].spec, rows[name].bits) == (str(spec), spec.grid.bits)
    assert {row.bits for row in rows.values() if row.role == "linear-weight" and row.spec} == {4, 8}


def test_a_search_is_named_with_its_budget_and_loss(artifact: Path) -> None:
    (row,) = explain(artifact, f"{QUERY}.weight")
    report = read(artifact, "reports/assign-precision.json")
    found = next(entry for entry in report["rows"] if row.tensor in entry["tensors"])
    (budget,) = report["budgets"]
    assert row.bits == found["bits"]
    assert row.reasons[0].startswith(f"a search over all quantizers chose {found['bits']} bits within {budget['name']}")
    assert f"of at most {budget['most']:g}" in row.reasons[0]
    assert row.reasons[1] == "the scheme gave linear-weight 8 bits before"


def test_what_was_measured_of_its_cost_is_said(artifact: Path) -> None:
    (row,) = explain(artifact, f"{QUERY}.weight")
    report = read(artifact, "reports/analyze-sensitivity.json")
    gains = [
        f"falls by {group['gain']:.3g} (place {place} of {len(report['groups'])})"
        for place, group in enumerate(report["groups"], start=1)
        if group["role"] in ("", "linear-weight") and (not group["layer"] or QUERY.startswith(group["layer"]))
    ]
    assert gains
    assert [gain for gain in gains if any(gain in line for line in row.change)] == gains


def test_what_stays_float_says_why(artifact: Path) -> None:
    (row,) = explain(artifact, "pooler.dense.weight")
    placed = read(artifact, "reports/quantize.json")["rows"]
    reason = next(entry["reason"] for entry in placed if entry["tensor"] == "pooler.dense.weight")
    assert (row.spec, row.bits, row.reasons) == ("", 32, (f"it stays float: {reason}",))


def test_modules_and_globs_choose_tensors(artifact: Path) -> None:
    inside = explain(artifact, "encoder.layer.0.attention.self")
    assert {f"{QUERY}.weight", f"{QUERY[:-5]}key.weight"} <= {row.tensor for row in inside}
    assert {row.tensor for row in explain(artifact, "encoder.layer.?.attention.self.query.weight")} == {
        f"{QUERY}.weight", f"{QUERY.replace('0', '1')}.weight",
    }  # fmt: skip
    with pytest.raises(BitlowerError, match=f"did you mean '{QUERY}'"):
        explain(artifact, f"{QUERY[:-1]}")


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(artifact), f"{QUERY}.weight"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{QUERY}.weight (linear-weight of {QUERY}): s")
    assert f"--ignore {QUERY}" in out
    assert main(["explain", str(artifact), "--json"]) == 0
    form = json.loads(capsys.readouterr().out)
    assert len(form["tensors"]) == len(explain(artifact))
    assert main(["explain", str(artifact)]) == 0
    assert "it stays float" in capsys.readouterr().out
    assert main(["explain", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err


def test_a_changed_artifact_is_not_explained(artifact: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "ledger.json").write_text("{}")
    with pytest.raises(CheckError, match=r"ledger\.json"):
        explain(copy)
