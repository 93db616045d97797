"""The manifest says what lies in the folder, and a changed folder is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.artifact.manifest import context_length
from bitlower.backends.artifact.resolved import float_bytes, resolved_tensors
from bitlower.backends.onnx_qdq.verify.artifact import verify_artifact, write_manifest
from bitlower.backends.onnx_qdq.verify.compare import verify_export
from bitlower.ir import BitlowerError, CheckError


@pytest.fixture
def artifact(handmade, tmp_path: Path) -> Path:
    folder = handmade.write(tmp_path / "artifact")
    (folder / "config.json").write_text("{}")
    verify_export(handmade.program, folder, handmade.batches).write(folder)
    write_manifest(handmade.program, folder, backend_options={"opset": 21}, provenance={"seed": 3})
    return folder


def rewrite(folder: Path, name: str, change) -> None:
    """Change a JSON file and what the manifest says about it."""
    form = json.loads((folder / name).read_text())
    change(form)
    (folder / name).write_text(json.dumps(form))
    relist(folder, name)


def relist(folder: Path, name: str) -> None:
    """Let the manifest say what a changed file is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_describes_program_and_files(artifact: Path, handmade):
    form = json.loads((artifact / "manifest.json").read_text())
    assert list(form) == sorted(form)
    assert set(form["files"]) == {"model.onnx", "config.json", "verification.json"}
    for name, entry in form["files"].items():
        data = (artifact / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert form["bytes"] == sum(entry["bytes"] for entry in form["files"].values())
    assert form["backend"] == "onnx-qdq"
    assert (form["backend_options"], form["provenance"]) == ({"opset": 21}, {"seed": 3})
    assert form["program"]["digest"] == handmade.program.digest()
    assert form["program"]["inputs"] == ["x: float32[batch, 8]"]
    assert {"bitlower", "torch", "transformers", "onnx", "onnxruntime"} <= set(form["versions"])


def test_the_context_is_what_the_manifest_says(artifact: Path, tmp_path: Path):
    form = json.loads((artifact / "manifest.json").read_text())
    for length in (None, 77):
        form["program"]["context_length"] = length
        (artifact / "manifest.json").write_text(json.dumps(form))
        assert context_length(artifact) == length
    (tmp_path / "other").mkdir()
    assert context_length(tmp_path / "other") is None
    for damaged in ("many", True, 0, 1.5):
        form["program"]["context_length"] = damaged
        (artifact / "manifest.json").write_text(json.dumps(form))
        with pytest.raises(CheckError, match=f"damaged: a context of {damaged!r} tokens"):
            context_length(artifact)


def test_the_resolved_scheme_has_every_tensor(handmade):
    rows = resolved_tensors(handmade.program)
    assert sorted(row["tensor"] for row in rows) == ["down.weight", "gelu", "up.weight", "x"]
    x = next(row for row in rows if row["tensor"] == "x")
    assert np.float32(x["scale"]) == handmade.tensors["x_codes.scale"]
    assert (x["zero_point"], x["scale_shape"], x["role"]) == (120, [], "linear-input")
    assert x["spec"] == {
        "num_bits": 8, "type": "uint", "symmetric": False, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    weight = next(row for row in rows if row["tensor"] == "up.weight")
    assert weight["scale_shape"] == [16, 1]
    assert "scale" not in weight


def test_float_size_counts_codes_as_floats(handmade):
    assert float_bytes(handmade.program) == 4 * (8 * 16 + 16 + 16 * 8 + 8)


def test_equal_folders_give_equal_manifests(artifact: Path, handmade):
    first = (artifact / "manifest.json").read_bytes()
    write_manifest(handmade.program, artifact, backend_options={"opset": 21}, provenance={"seed": 3})
    assert (artifact / "manifest.json").read_bytes() == first
    assert str(artifact.parent).encode() not in first
    assert not list(artifact.glob(".*"))


def test_a_sound_artifact_passes(artifact: Path):
    (artifact / "notes.txt").write_text("mine")
    report = verify_artifact(artifact)
    assert report.files == 3
    assert report.unlisted == ("notes.txt",)
    assert report.kernels.integer == {"MatMulIntegerToFloat": 2}
    for figures in (report.selftest, report.unseen):
        assert figures["y"] == pytest.approx(1.0, abs=1e-9)
    assert report.unseen_sizes == "batch 3"
    json.dumps(report.to_dict())


def test_a_model_with_the_rows_of_its_self_test_baked_in_is_refused(artifact: Path, handmade):
    def edit(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == "Bias_down").output[0] = "y_before"
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 8], np.int64), "rows"))
        model.graph.node.append(helper.make_node("Reshape", ["y_before", "rows"], ["y"], name="Baked"))

    handmade.write(artifact, edit)
    relist(artifact, "model.onnx")
    with pytest.raises(
        CheckError, match=r"^at batch 3, which tracing and calibration did not have: onnxruntime cannot"
    ):
        verify_artifact(artifact)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "verification.json", "manifest.json"])
def test_a_missing_file_is_named(artifact: Path, name: str):
    (artifact / name).unlink()
    with pytest.raises(CheckError, match=f"{name} is missing"):
        verify_artifact(artifact)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "verification.json"])
def test_a_changed_byte_is_found(artifact: Path, name: str):
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(CheckError, match=f"{name} .* was changed"):
        verify_artifact(artifact)


def test_a_truncated_file_is_found(artifact: Path):
    data = (artifact / "model.onnx").read_bytes()
    (artifact / "model.onnx").write_bytes(data[:-7])
    with pytest.raises(CheckError, match=f"model.onnx .* has {len(data) - 7} bytes, the manifest says {len(data)}"):
        verify_artifact(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {"a": {}}}', '{"files": []}', '{"files": {}}'])
def test_a_damaged_manifest_is_refused(artifact: Path, text: str):
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(CheckError, match=r"manifest\.json"):
        verify_artifact(artifact)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_point_outside_the_folder(artifact: Path, name: str):
    (artifact.parent / "secret").write_text("")
    form = json.loads((artifact / "manifest.json").read_text())
    form["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(form))
    with pytest.raises(CheckError, match="outside the folder"):
        verify_artifact(artifact)


def test_no_folder_is_bad_input(tmp_path: Path):
    with pytest.raises(BitlowerError, match="no artifact") as caught:
        verify_artifact(tmp_path / "none")
    assert caught.value.exit_code == 2


def test_a_model_that_computes_something_else_is_found_behind_a_right_hash(artifact: Path):
    model = onnx.load(artifact / "model.onnx")
    codes = next(t for t in model.graph.initializer if t.name == "down.weight_codes")
    codes.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(codes)[::-1].copy(), codes.name))
    onnx.save(model, artifact / "model.onnx")
    relist(artifact, "model.onnx")
    with pytest.raises(CheckError, match="the output y has the cosine"):
        verify_artifact(artifact)


def test_a_model_that_does_not_load_is_found_behind_a_right_hash(artifact: Path):
    model = onnx.load(artifact / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, artifact / "model.onnx")
    relist(artifact, "model.onnx")
    with pytest.raises(CheckError, match="onnxruntime does not load"):
        verify_artifact(artifact)


def test_lost_kernels_are_found(artifact: Path):
    rewrite(artifact, "verification.json", lambda form: form["kernels"]["integer"].update(MatMulIntegerToFloat=3))
    with pytest.raises(CheckError, match="integer kernels"):
        verify_artifact(artifact)


def test_another_version_of_the_runtime_may_choose_other_kernels(artifact: Path):
    def change(form):
        form["kernels"]["integer"] = {"QGemm": 2}
        form["runtime"]["onnxruntime"] = "1.0"

    rewrite(artifact, "verification.json", change)
    report = verify_artifact(artifact)
    assert report.recorded_runtime["onnxruntime"] == "1.0"
    assert report.kernels.found == 2


def test_damaged_selftest_inputs_are_refused(artifact: Path):
    rewrite(artifact, "verification.json", lambda form: form["selftest"]["inputs"]["x"].update(dtype="int99"))
    with pytest.raises(
        CheckError, match=r"verification\.json is damaged: selftest\.inputs\.x\.dtype: should be 'bool'"
    ):
        verify_artifact(artifact)


def test_selftest_inputs_are_short_and_exact(artifact: Path, handmade):
    form = json.loads((artifact / "verification.json").read_text())["selftest"]
    values = torch.tensor(form["inputs"]["x"]["values"])
    assert torch.equal(values, handmade.batches[0]["x"][:2])
    assert len(form["outputs"]["y"]["values"]) <= 64


def test_files_appear_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"b": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert read_json(path) == {"b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
