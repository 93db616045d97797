"""What the report measures or draws of tensors and kernels, and what it advises, against other readings of the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitlower import report as write
from bitlower.backends.base import Backend
from bitlower.backends.onnx_qdq import OnnxQdq


@pytest.fixture(scope="module")
def page(artifacts: Any, tmp_path_factory: pytest.TempPathFactory, page_of: Any) -> Any:
    """The report of the plain artifact, read."""
    return page_of(write(artifacts.plain, output=tmp_path_factory.mktemp("page") / "report.html").read_text())


def read(folder: Path, name: str) -> Any:
    """A file of JSON."""
    return json.loads((folder / name).read_text())


def test_scales_and_norms_of_tokens_have_pictures(artifacts: Any, page: Any) -> None:
    """Scales against the ONNX file's, and norms of tokens against transformers' hidden states."""
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import AutoModel, AutoTokenizer

    rows = {row["tensor"]: row for row in read(artifacts.plain, "reports/tensors.json")["tensors"]}
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifacts.plain / "model.onnx").graph.initializer}
    name = "embeddings.word_embeddings.weight"
    scales = np.sort(stored[f"{name}_scale"].reshape(-1))
    assert rows[name]["scales"]["count"] == len(scales)
    assert rows[name]["scales"]["sorted"][-1] == pytest.approx(scales[-1], rel=1e-3)
    [table] = [
        rows
        for caption, rows in page.tables.items()
        if caption.endswith(f"stored scales, from small to great, of {name}")
    ]
    assert float(table[-1][1]) == pytest.approx(scales[-1], rel=1e-3)

    tokenizer, model = AutoTokenizer.from_pretrained(artifacts.model), AutoModel.from_pretrained(artifacts.model)
    norms: list[torch.Tensor] = []
    dense = model.encoder.layer[0].attention.output.dense
    dense.register_forward_pre_hook(lambda _, inputs: norms.append(inputs[0].detach().norm(dim=-1).reshape(-1)))
    for text in (artifacts.plain.parent / "texts.txt").read_text().splitlines():
        model(**tokenizer(text, return_tensors="pt"))
    [seen] = [row for row in rows.values() if row["path"] == "encoder.layer.0.attention.self"]
    every = torch.cat(norms)
    assert seen["tokens"]["sorted"] == sorted(seen["tokens"]["sorted"])
    assert seen["tokens"]["sorted"][0] >= float(every.min()) * 0.98
    assert seen["tokens"]["sorted"][-1] <= float(every.max()) * 1.02
    firsts = [float(one[0]) for one in norms]
    assert min(firsts) * 0.98 <= seen["tokens"]["first"][0] <= max(firsts) * 1.02  # all texts begin with [CLS]
    assert any("norms of tokens, from small to great" in caption for caption in page.tables)


def test_the_verdict_ends_with_what_costs_most(page: Any, artifacts: Any) -> None:
    """The pass, the layer and the tensors, each against its file."""
    rows = {row[0]: row for row in page.tables["Where the loss comes from, and what to try next"][1:]}
    ledger = read(artifacts.plain, "ledger.json")["rows"]
    losses = [next(iter(row["outputs"].values()))["relative_error"] for row in ledger]
    costs = np.diff([0.0, *losses])
    costliest = ledger[int(np.argmax(costs))]["pass"]
    assert f"{losses[int(np.argmax(costs))]:.4g}" in rows[costliest][1]
    layer = min(
        (layer for layer in ledger[-1]["layers"] if layer["sqnr_db"] is not None), key=lambda layer: layer["sqnr_db"]
    )
    assert f"{layer['sqnr_db']:.1f} dB" in rows[layer["path"]][1]
    tensors = read(artifacts.plain, "reports/tensors.json")["tensors"]
    worst = sorted((row["sqnr_db"], row["tensor"], row["path"]) for row in tensors if row["sqnr_db"] is not None)[:3]
    placed = {row["tensor"]: row["path"] for row in read(artifacts.plain, "reports/quantize.json")["rows"]}
    for decibels, tensor, path in worst:
        [row] = [row for name, row in rows.items() if name.startswith((tensor, path)) and "rounding alone" in row[1]]
        assert f"{decibels:.1f} dB" in row[1]
        assert f"--ignore {placed[tensor]}" in row[2]


def test_kernels_are_timed_where_the_report_is_asked_to(artifacts: Any, tmp_path: Path, page_of: Any) -> None:
    """Every kernel of the optimized graph, as often as it is there; the shares are of their sum."""
    import onnx
    import onnxruntime

    target = write(artifacts.plain, output=tmp_path / "timed.html", profile=True)
    page = page_of(target.read_text())
    [rows] = [rows for caption, rows in page.tables.items() if "kernel by kernel" in caption]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(artifacts.plain / "model.onnx", options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert {row[0]: int(row[1]) for row in rows[1:]} == dict(counts)
    assert sum(float(row[3].rstrip("%")) for row in rows[1:]) == pytest.approx(100, abs=0.1 * len(rows))
    times = [float(row[2].replace(",", "")) for row in rows[1:]]
    assert times == sorted(times, reverse=True)
    assert times[-1] >= 0
    assert "kernel by kernel" not in write(artifacts.plain, output=tmp_path / "timed.html").read_text()


def test_kernels_of_two_artifacts_stand_side_by_side(artifacts: Any, tmp_path: Path, page_of: Any) -> None:
    text = write(artifacts.plain, artifacts.other, output=tmp_path / "both.html", profile=True).read_text()
    header, *rows, total = page_of(text).tables["Time of kernels in one run (µs)"]
    assert header[1:] == ["plain", "other"]
    for column in (1, 2):
        cells = [float(row[column].replace(",", "")) for row in rows if row[column]]
        assert float(total[column].replace(",", "")) == pytest.approx(sum(cells), rel=1e-2)


def test_a_runtime_that_does_not_say_is_named(artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxQdq, "kernel_times", Backend.kernel_times)
    text = write(artifacts.plain, output=tmp_path / "timed.html", profile=True).read_text()
    assert "The runtime of onnx-qdq does not say what its kernels take." in text
