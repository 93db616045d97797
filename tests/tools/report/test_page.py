"""The report against its artifact's files, read here by themselves."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitlower import report as write
from bitlower.backends.registry import verify_artifact
from bitlower.ir import BitlowerError, CheckError
from bitlower.tools.cli import main
from bitlower.tools.report.page import DATA_BYTES, MOST_BYTES

PARTS = (
    "verdict", "ledger", "depth", "widths", "tensors", "outliers", "front", "training", "checks", "samples",
    "comparison", "environment",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(artifacts: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of the plain artifact."""
    return write(artifacts.plain, output=tmp_path_factory.mktemp("page") / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str, page_of: Any) -> Any:
    """The same, read."""
    return page_of(text)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def shown(value: float) -> str:
    return f"{value:.4g}"


def test_it_is_one_file_that_loads_nothing(text: str, page: Any) -> None:
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.partition('<script type="application/json"')[0])
    loading = {"src", "srcset", "poster", "background"}
    assert not [tag for tag, named in page.attributes if loading & named.keys() or tag in ("link", "iframe", "img")]
    assert all(link.startswith("#") for link in page.links)


def test_every_part_is_there_and_every_link_leads_somewhere(page: Any) -> None:
    assert [name for name in page.ids if name in PARTS] == list(PARTS)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= {*page.ids}
    assert all(page.parts[name].strip() for name in PARTS)


def test_pictures_and_tables_can_be_read_without_seeing(page: Any) -> None:
    pictures = [named for tag, named in page.attributes if tag == "svg"]
    assert len(pictures) > 5
    for named in pictures:
        assert named["role"] == "img"
        assert all(name in page.ids for name in str(named["aria-labelledby"]).split())
    assert all(named.get("scope") in ("col", "row") for tag, named in page.attributes if tag == "th")
    assert all(page.tables)
    assert sum(tag == "figure" for tag, _ in page.attributes) == len(pictures)
    assert page.tables.keys() > {"The ledger: every figure after every lossy pass", "Every quantized tensor"}


def test_the_ledger_is_that_of_the_file(page: Any, artifacts: Any) -> None:
    rows = page.tables["The ledger: every figure after every lossy pass"]
    column = {name: place for place, name in enumerate(rows[0])}
    expected = [
        (output, shown(losses["relative_error"]), shown(losses["cosine"]))
        for row in read(artifacts.plain, "ledger.json")["rows"]
        for output, losses in row["outputs"].items()
    ]
    got = [(row[column["output"]], row[column["relative error"]], row[column["cosine"]]) for row in rows[2:]]
    assert got == expected
    assert len(expected) > 2


def test_another_ledger_is_another_page(artifacts: Any, tmp_path: Path, page_of: Any) -> None:
    copy = Path(shutil.copytree(artifacts.plain, tmp_path / "copy"))
    ledger = read(copy, "ledger.json")
    ledger["rows"][-1]["outputs"]["last_hidden_state"]["relative_error"] = 0.987654
    ledger["rows"][-1]["layers"][0]["sqnr_db"] = 3.25
    (copy / "ledger.json").write_text(json.dumps(ledger))
    changed = page_of(write(copy, output=tmp_path / "changed.html").read_text())
    assert any("0.9877" in row for row in changed.tables["The ledger: every figure after every lossy pass"])
    assert "First below 20 dB" in changed.parts["depth"]
    assert "3.2 dB" in changed.parts["depth"]


def test_depth_has_every_layer_of_the_last_row(page: Any, artifacts: Any) -> None:
    layers = read(artifacts.plain, "ledger.json")["rows"][-1]["layers"]
    table = page.tables["Signal over noise by depth, after calibrate, in order of execution"]
    assert [row[:2] for row in table[1:]] == [[layer["path"], layer["node"]] for layer in layers]
    assert [float(row[2]) for row in table[1:]] == pytest.approx([layer["sqnr_db"] for layer in layers], rel=1e-3)
    cells = [
        cell
        for row in page.tables["Signal over noise in dB, layer by role; the stronger the colour, the noisier"][1:]
        for cell in row[1:]
    ]
    assert sorted(cell for cell in cells if cell) == sorted(f"{layer['sqnr_db']:.1f}" for layer in layers)


def test_bits_are_those_of_the_manifest(page: Any, artifacts: Any) -> None:
    rows = page.tables["Why every tensor has its bits"][1:]
    bits = {(row[0], row[2]): row[3] for row in rows}
    assert any("float" in row[3] and "the scheme leaves" in row[4] for row in rows)
    resolved = {
        (row["tensor"], row["role"]): str(row["spec"]["num_bits"])
        for row in read(artifacts.plain, "manifest.json")["tensors"]
    }
    assert {key: value for key, value in bits.items() if value != "float"} == resolved
    assert all(row[4] for row in rows)


def test_tensors_are_those_of_the_model(artifacts: Any) -> None:
    """Ranges, channels and histograms of weights against the model's own file, in numpy."""
    from safetensors.numpy import load_file

    weights = load_file(artifacts.model / "model.safetensors")
    rows = {row["tensor"]: row for row in read(artifacts.plain, "reports/tensors.json")["tensors"]}
    assert {"linear-weight", "embedding-table", "linear-input"} <= {row["role"] for row in rows.values()}
    seen = 0
    for name, weight in weights.items():
        row = rows.get(name)
        if row is None:
            continue
        seen += 1
        assert (row["minimum"], row["maximum"]) == pytest.approx((weight.min(), weight.max()), rel=1e-5)
        assert row["values"] == sum(row["histogram"]["counts"]) == weight.size
        start, step, counts = (row["histogram"][key] for key in ("start", "step", "counts"))
        assert len(counts) <= 64
        edges = start + step * np.arange(len(counts) + 1)
        inner = [int((weight < edge).sum()) for edge in edges[1:-1]]
        assert np.allclose(np.cumsum(counts)[:-1], inner, atol=2)  # the file has six digits of the edges
        low, high = weight.min(1), weight.max(1)
        for index, least, greatest in zip(*(row["channels"][key] for key in ("index", "low", "high")), strict=True):
            assert (least, greatest) == pytest.approx((low[index], high[index]), rel=1e-3)
        widths = [b - a for a, b in zip(row["channels"]["low"], row["channels"]["high"], strict=True)]
        assert widths == sorted(widths) or np.all(np.diff(widths) > -1e-3)
        if row["role"] == "linear-weight":
            scale = np.abs(weight).max(1, keepdims=True) / 127
            assert row["codes_used"] <= len(np.unique(np.clip(np.round(weight / scale), -128, 127))) + 16
    assert seen >= 10


def test_the_noise_of_rounding_is_that_of_the_codes_in_the_artifact(artifacts: Any) -> None:
    """Signal over noise and the codes in use, from the scales and codes that the ONNX file holds."""
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import load_file

    weights = load_file(artifacts.model / "model.safetensors")
    rows = {row["tensor"]: row for row in read(artifacts.plain, "reports/tensors.json")["tensors"]}
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifacts.plain / "model.onnx").graph.initializer}
    name = "embeddings.word_embeddings.weight"
    codes, scale = stored[f"{name}_codes"].astype(np.float64), stored[f"{name}_scale"].astype(np.float64)
    noise = codes * scale.reshape(-1, 1) - weights[name]
    expected = 10 * math.log10((weights[name].astype(np.float64) ** 2).sum() / (noise**2).sum())
    assert rows[name]["sqnr_db"] == pytest.approx(expected, abs=1e-3)
    assert rows[name]["codes_used"] == len(np.unique(codes))


def test_channels_before_are_those_of_the_float_model(artifacts: Any) -> None:
    """The largest values of the last residual sum, against the input of transformers' last LayerNorm."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    maps = read(artifacts.plain, "reports/tensors.json")["channels"]
    assert [row["path"] for row in maps] == [
        f"encoder.layer.{layer}.{part}" for layer in (0, 1) for part in ("attention.output", "output")
    ]
    lines = (artifacts.plain.parent / "texts.txt").read_text().splitlines()
    tokenizer, model = AutoTokenizer.from_pretrained(artifacts.model), AutoModel.from_pretrained(artifacts.model)
    sizes: list[torch.Tensor] = []
    norm = model.encoder.layer[1].output.LayerNorm
    norm.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].detach().abs().reshape(-1, 32)))
    with torch.no_grad():
        for line in lines:
            model(**tokenizer(line, return_tensors="pt"))
    most = torch.cat(sizes).amax(0)
    before = torch.tensor(maps[-1]["before"])
    assert (before <= most * 1.001).all()  # held-out texts are some of all
    assert float((before / most).mean()) > 0.8


def test_charts_of_a_plugin_are_drawn(page: Any) -> None:
    assert "three toy charts" in page.parts["ledger"]
    assert page.tables["Toy lines"][1:] == [
        ["toy curve", "0", "4.25"], ["toy curve", "1", "2.125"], ["toy curve", "2", ""],
    ]  # fmt: skip
    assert page.tables["Toy bars"] == [["name", "toy bar"], ["first", "1.5"], ["second", ""]]
    assert page.tables["Toy map"][1] == ["north", "7.25", "–"]
    assert sum("Toy" in title for title in page.tables) == 3


def test_what_is_missing_says_what_gives_it(page: Any) -> None:
    assert "`" not in page.parts["front"]
    assert "assign-precision" in page.parts["front"]
    assert all(name in page.parts["training"] for name in ("gptq", "qat", "lkd"))
    assert "bitlower report DIR DIR2" in page.parts["comparison"]
    assert "report: true" in page.parts["ledger"]


def test_sensitivity_is_in_the_part_of_the_bits(page: Any, artifacts: Any) -> None:
    groups = read(artifacts.plain, "reports/analyze-sensitivity.json")["groups"]
    group = next(group for group in groups if group["role"] and group["layer"])
    table = page.tables[next(title for title in page.tables if title.startswith("Loss with these alone ("))]
    row = next(row for row in table if row[0] == group["layer"])
    assert row[table[0].index(group["role"])] == shown(group["one_in"])


def test_samples_are_those_of_the_file(page: Any, artifacts: Any) -> None:
    samples = read(artifacts.plain, "reports/tensors.json")["samples"]
    table = page.tables["By last_hidden_state, the worst first"]
    assert [row[2] for row in table[1:]] == [shown(row["relative_error"]) for row in samples]
    assert len(samples) == 8, "a fifth of the texts is left for that"
    whole = read(artifacts.plain, "ledger.json")["rows"][-1]["outputs"]["last_hidden_state"]["relative_error"]
    assert samples[-1]["relative_error"] <= whole <= samples[0]["relative_error"]
    assert "report: true" in page.parts["samples"]


def test_the_model_card_is_that_of_the_artifact(text: str, artifacts: Any) -> None:
    assert (artifacts.plain / "README.md").read_text().strip() in html.unescape(text)


def test_two_runs_are_compared(artifacts: Any, tmp_path: Path, page_of: Any) -> None:
    both = page_of(write(artifacts.plain, artifacts.other, output=tmp_path / "both.html").read_text())
    lines = {tuple(row) for row in both.tables["Lines of the recipes that differ"][1:]}
    assert lines == {
        ("plain", "- quantize: {scheme: W8A8}"), ("other", "- quantize: {scheme: W4A8-full}"),
        ("plain", "- calibrate: {activations: minmax}"), ("other", "- calibrate: {activations: mse-golden}"),
        ("other", "report: true"),
    }  # fmt: skip
    figures = {row[0]: row[1:] for row in both.tables["Figures of both"][1:]}
    losses = [read(folder, "ledger.json")["rows"][-1]["outputs"]["last_hidden_state"]["relative_error"]
              for folder in (artifacts.plain, artifacts.other)]  # fmt: skip
    assert figures["relative error"][:2] == [shown(loss) for loss in losses]
    assert figures["relative error"][3] == ("worse" if losses[1] > losses[0] else "better")


def test_a_run_with_a_report_has_its_times_and_the_same_artifact(artifacts: Any, page_of: Any) -> None:
    page = page_of((artifacts.other / "report.html").read_text())
    stages = [row[0] for row in page.tables["Seconds and peak memory of every stage"][1:]]
    assert stages[:4] == ["load", "data", "clean", "analyze-outliers"]
    assert stages[-1] == "onnx-qdq"
    lines = (artifacts.other.parent / "texts.txt").read_text().splitlines()
    assert {row[-1] for row in page.tables["By last_hidden_state, the worst first"][1:]} <= {*lines}
    assert f"to look at: {artifacts.other / 'report.html'}" in artifacts.said
    assert "report.html" not in read(artifacts.other, "manifest.json")["files"]
    assert verify_artifact(artifacts.other)["unlisted"] == ["report.html"]


def test_the_data_are_embedded(text: str, artifacts: Any) -> None:
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert embedded
    data = json.loads(embedded[1])
    assert len(embedded[1]) < DATA_BYTES
    assert data["ledger"]["rows"][-1]["outputs"] == read(artifacts.plain, "ledger.json")["rows"][-1]["outputs"]
    assert len(data["tensors"]) == len(read(artifacts.plain, "reports/tensors.json")["tensors"])


def test_names_in_files_are_text_and_never_markup(artifacts: Any, tmp_path: Path, page_of: Any) -> None:
    hostile = "</script><script>alert(1)</script>\"'&<b>"
    copy = Path(shutil.copytree(artifacts.other, tmp_path / "copy"))
    places = (
        "encoder.layer.0.attention.output",
        "analyze-outliers",
        "onnx-qdq",
        "last_hidden_state",
        "[batch",
        "mse-golden",
    )
    for path in (*copy.glob("*.json"), *copy.glob("reports/*.json"), copy / "recipe.yaml"):
        text = path.read_text()
        for place in places:
            text = text.replace(place, place + (json.dumps(hostile)[1:-1] if path.suffix == ".json" else hostile))
        path.write_text(text)
    text = write(copy, output=tmp_path / "out.html").read_text()
    assert "<script>alert" not in text
    page = page_of(text)
    assert "alert(1)" in page.parts["depth"]
    assert sum(tag == "script" for tag, _ in page.attributes) == 2
    assert not [tag for tag, _ in page.attributes if tag == "b"]


def test_the_command_writes_beside_the_folder(
    artifacts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(artifacts.plain, tmp_path / "model")
    assert main(["report", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "model.html")
    assert main(["report", str(copy)]) == 0, "a report may be written again"
    assert "model.html" in capsys.readouterr().out


def damage(folder: Path) -> None:
    ledger = read(folder, "ledger.json")
    ledger["rows"][0]["bytes"] = "many"
    (folder / "ledger.json").write_text(json.dumps(ledger))


@pytest.mark.parametrize(
    ("prepare", "message", "kind"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no artifact at", BitlowerError),
        (damage, "ledger.json in .* is damaged: rows.0.bytes", CheckError),
        (lambda folder: (folder / "reports" / "toy.json").write_text("{"), "toy.json in .* is damaged", CheckError),
        (lambda folder: (folder.parent / "out.html").write_text("mine"), "out.html exists already and is no report",
         BitlowerError),
        (lambda folder: (folder.parent / "out.html").mkdir(), "out.html is a folder; give a file", BitlowerError),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    artifacts: Any, tmp_path: Path, prepare: Callable[[Path], object], message: str, kind: type[BitlowerError]
) -> None:
    copy = Path(shutil.copytree(artifacts.plain, tmp_path / "copy"))
    prepare(copy)
    with pytest.raises(kind) as caught:
        write(copy, output=tmp_path / "out.html")
    assert re.search(message, str(caught.value))


def test_a_folder_of_artifacts_says_which_to_give(artifacts: Any, tmp_path: Path) -> None:
    shutil.copytree(artifacts.plain, tmp_path / "several" / "one")
    with pytest.raises(BitlowerError, match="holds 1 artifacts; give one of them"):
        write(tmp_path / "several")
