"""The verdict of a run: in its artifact, in the terminal, and as an exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bitlower.frontends import load
from bitlower.ir import CheckError
from bitlower.passes import Context, PassManager, make_pass
from bitlower.tools.cli import main
from bitlower.tools.runs.flow import quantize
from bitlower.tools.verdict.figures import Figure
from bitlower.tools.verdict.verdict import FILE, Verdict, read_verdict, scheme_words

ANIMALS, VERBS, PLACES = ("cat", "dog", "bird"), ("sings", "runs", "sleeps"), ("near", "under", "over", "always")


@pytest.fixture(scope="module")
def artifact(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder in W8A8."""
    output = tmp_path_factory.mktemp("verdict") / "out"
    sentences = [f"the {animal} {verb} {place}" for animal in ANIMALS for verb in VERBS for place in PLACES]
    quantize(bert, scheme="W8A8", calibration=sentences, samples=24, output=output)
    return output


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_the_file_agrees_with_the_other_files(artifact: Path) -> None:
    form, manifest = read(artifact, FILE), read(artifact, "manifest.json")
    figures = {row["name"]: row for row in form["figures"]}
    last = read(artifact, "ledger.json")["rows"][-1]["outputs"]["last_hidden_state"]
    assert figures["cosine"]["value"] == last["cosine"]
    assert figures["relative_error"]["value"] == last["relative_error"]
    kernels = read(artifact, "verification.json")["kernels"]
    assert (figures["integer_products"]["value"], figures["integer_products"]["of"]) == (
        kernels["found"], kernels["expected"],
    )  # fmt: skip
    assert form["bytes"] == manifest["bytes"] - manifest["files"][FILE]["bytes"]
    assert sum(entry["bytes"] for entry in manifest["files"].values()) == manifest["bytes"]
    assert figures["size_ratio"]["value"] == pytest.approx(form["float_bytes"] / form["bytes"], rel=1e-5)
    assert f"{kernels['found']} of {kernels['expected']} products in integers" in form["verdict"]
    assert "verified in onnxruntime" in form["verdict"]
    assert ", W8A8: " in form["verdict"]


def test_it_is_read_back(artifact: Path) -> None:
    verdict = read_verdict(artifact)
    assert verdict is not None
    assert verdict.to_dict() == read(artifact, FILE)
    assert read_verdict(artifact.parent) is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"figures": []}')
    with pytest.raises(CheckError, match=r"verdict\.json"):
        read_verdict(tmp_path)


def test_verify_says_it_and_fails_on_conditions(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact), "--fail-if", "selftest_cosine < 0.9"]) == 0
    out, err = capsys.readouterr()
    assert f"{artifact} is sound: " in out
    assert "verified in onnxruntime" in out
    assert err.strip().endswith("ACCEPT: selftest_cosine is 1 and fails if < 0.9")
    assert main(["verify", str(artifact), "--json", "--fail-if", "cosine <= 1"]) == 1
    out, err = capsys.readouterr()
    form = json.loads(out)
    assert form["accepted"] is False
    assert form["conditions"][0] in err
    assert main(["verify", str(artifact), "--fail-if", "kl > 1"]) == 2
    assert "kl was not measured" in capsys.readouterr().err


def test_conditions_are_read_before_work(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(bert), "--scheme", "W8A8-token", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--fail-if", "cosin < 1"]) == 2
    assert "did you mean 'cosine'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_held_out_data_no_cost_is_claimed() -> None:
    verdict = Verdict("m", "W4A16", 100, 50, "", "", ())
    assert verdict.line.endswith("there were no held-out data; not run here, and not verified")
    assert verdict.cost == ""


def test_mixed_widths_are_said(llama: Path) -> None:

    passes = (
        make_pass("clean"),
        make_pass("quantize", {"scheme": "W8A16", "targets": ["model.layers.0"]}),
        make_pass("quantize", {"scheme": "W4A16-g16"}),
    )
    program = PassManager(passes).run(load(llama), Context())
    assert scheme_words(passes, program) == "W8A16 + W4A16-g16 with weights of 4 and 8 bits"
    assert scheme_words(passes[:1], load(llama)) == ""


def test_notebooks_show_the_verdict_and_the_program(artifact: Path, bert: Path) -> None:
    verdict = read_verdict(artifact)
    assert verdict is not None
    page = ElementTree.fromstring(verdict.html())
    assert page.findtext("caption") == verdict.line
    cells = [[cell.text or "" for cell in row] for row in page.findall("tbody/tr")]
    assert [row[0] for row in cells] == [figure.name for figure in verdict.figures]
    assert [row[1] for row in cells] == [figure.text for figure in verdict.figures]
    made = quantize(bert, scheme="W8A8-token")
    assert made._repr_html_() == made.summary.verdicts[""].html()
    rows = {row[0].text: row[1].text for row in ElementTree.fromstring(made.program._repr_html_()).findall("tbody/tr")}
    assert rows["level"] == "integer"
    linears = sum(row.role == "linear-weight" for _, row in made.program.quantizers())
    assert f"{linears} × linear-weight: s8 per-channel(0)" in rows["quantized"]


def test_few_bits_have_ranges_of_their_own(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("the cat sings and a dog runs under the old tree " * 30)
    made = quantize(llama, scheme="W4A16-g16", calibration=text, samples=4, max_length=12, algorithm="rtn")
    verdict = made.summary.verdicts[""]
    by_name = {figure.name: figure for figure in verdict.figures}
    assert by_name["kl"].normal == "≤ 0.2 nats"
    row = made.summary.ledger["rows"][-1]["outputs"]["logits"]
    assert by_name["perplexity"].value == row["perplexity"]
    assert verdict.cost.startswith(f"perplexity {row['reference_perplexity']:.4g} → {row['perplexity']:.4g} (")
    assert Verdict.from_dict(json.loads(verdict.text())).to_dict() == json.loads(verdict.text())


def test_a_model_that_was_wrecked_has_a_verdict_too() -> None:
    figures = (Figure("runtime_cosine", math.nan), Figure("perplexity_increase", math.inf))
    verdict = Verdict("m", "W2A16", 100, 50, "logits", "x 1", figures)
    assert "logits is not finite, and cannot be compared" in verdict.line
    assert [figure.text for figure in figures] == ["nan", "inf %"]
    assert [figure.is_normal for figure in figures] == [False, False]
