"""Artifacts that lie: a file that is not what the manifest says, or a manifest and records that say nonsense."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.backends import registry
from bitlower.backends.artifact.manifest import check_artifact, check_if_artifact, is_artifact
from bitlower.backends.artifact.outputs import OutputError
from bitlower.backends.artifact.schema import parsed
from bitlower.backends.artifact.selftest import SelfTest, make_selftest, run_selftest
from bitlower.backends.artifact.unseen import Unseen
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.backends.onnx_qdq.verify.artifact import verify_artifact
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.ir import BitlowerError, CheckError

Form = dict[str, Any]
HUGE = 10**12


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def rewrite(folder: Path, name: str, change: Callable[[Form], object]) -> None:
    """Change a JSON file, and what the manifest says about it, so that only its contents are wrong."""
    form = json.loads((folder / name).read_text())
    change(form)
    data = json.dumps(form).encode()
    (folder / name).write_bytes(data)
    if name != "manifest.json":
        listing = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({name: listing}))


def put(path: str, value: Any) -> Callable[[Form], None]:
    """Set the entry ``a.b.0.c``; without a value remove it."""
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]

    def change(form: Any) -> None:
        for part in parents:
            form = form[part]
        form[last] = value

    return change


RECORDS = [
    ("selftest.outputs", {}, r"selftest\.outputs: "),
    ("selftest.inputs", {}, r"selftest\.inputs: "),
    ("selftest.inputs.x.values", {"shape": [HUGE, 1]}, r"selftest\.inputs\.x: its values make no float32 tensor"),
    ("selftest.inputs.x.values", {"shape": [0, HUGE]}, r"selftest\.inputs\.x: its values make no float32 tensor"),
    ("selftest.inputs.x.values", {"shape": "many"}, r"selftest\.inputs\.x: its values make no"),
    ("selftest.inputs.x.values", {}, r"selftest\.inputs\.x: its values make no"),
    ("selftest.inputs.x.values", [[1.0], [1.0, 2.0]], r"selftest\.inputs\.x: its values make no"),
    ("selftest.inputs.x.values", ["text"], r"selftest\.inputs\.x: its values make no"),
    ("selftest.inputs.x.dtype", "load", r"selftest\.inputs\.x\.dtype: should be 'bool'"),
    ("selftest.inputs.x", [], r"selftest\.inputs\.x: "),
    ("selftest.inputs.x.values", [[1.0, 2.0]], r"onnxruntime cannot run model\.onnx"),
    ("selftest.inputs", {"y": {"dtype": "float32", "values": [1.0]}}, r"do not agree on the input 'x'"),
    ("selftest.outputs.y.shape", [HUGE, 8], r"selftest\.outputs\.y\.shape\.0: should be less than"),
    ("selftest.outputs.y.shape", [2], r"selftest\.outputs\.y: \d+ values for the shape \[2\]"),
    ("selftest.outputs.y.values", [], r"selftest\.outputs\.y: 0 values for the shape"),
    ("selftest.outputs.y.values", ["1"] * 64, r"selftest\.outputs\.y\.values\.0: should be a valid number, not '1'"),
    ("selftest.outputs.y.rms", -1.0, r"selftest\.outputs\.y\.rms: "),
    ("selftest.outputs.y.rms", 1e9, r"the output y has the root mean square .*, 1e\+09 was recorded"),
    ("selftest", None, r"selftest: "),
    ("outputs.0.worst", "far", r"outputs\.0\.worst: should be a valid number, not 'far'"),
    ("outputs", {}, r"outputs: should be a valid array, not {}"),
    ("quantized.0.codes", 1.5, r"quantized\.0\.codes: "),
    ("kernels.integer", {"MatMulIntegerToFloat": "2"}, r"kernels\.integer\.MatMulIntegerToFloat: "),
    ("session_config", {"x": 1}, r"session_config\.x: should be a valid string, not 1"),
    ("session_config", {"k" * 5000: "1"}, r"onnxruntime does not load model\.onnx"),
    ("session_config", ["x"], r"session_config: "),
    ("runtime", 5, r"runtime: "),
    ("batches", True, r"batches: should be a valid integer, not True"),
]
MANIFEST = [
    ("files", {}, "does not list model.onnx"),
    ("files", [], r"files: "),
    ("files.config\\json", {"bytes": 0, "sha256": "0" * 64}, "names a file outside"),
    ("files.manifest!json", {"bytes": 0, "sha256": "0" * 64}, "names a file outside"),
    ("files.a", {"bytes": 0, "sha256": "0" * 64}, "a is missing in"),
    ("files.a", {"bytes": -1, "sha256": "0" * 64}, r"files\.a\.bytes: should be greater than or equal to 0, not -1"),
    ("files.a", {"bytes": "1", "sha256": "0" * 64}, r"files\.a\.bytes: should be a valid integer"),
    ("files.a", {"bytes": 1, "sha256": "x"}, r"files\.a\.sha256: "),
    ("files.a", {"bytes": 1}, r"files\.a\.sha256: field required"),
    (f"files.{'n' * 5000}", {"bytes": 0, "sha256": "0" * 64}, "cannot be read: File name too long"),
    ("files.null", {"bytes": 0, "sha256": "0" * 64}, "cannot be read: "),
    ("program", [], r"program: "),
    ("versions", {"torch": 2}, r"versions\.torch: "),
    ("tensors", "many", r"tensors: "),
]


@pytest.mark.parametrize(("path", "value", "message"), RECORDS)
def test_a_record_that_says_nonsense_is_named(artifact: Path, path: str, value: Any, message: str) -> None:
    rewrite(artifact, "verification.json", put(path, value))
    with pytest.raises(CheckError, match=message) as info:
        verify_artifact(artifact)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(("path", "value", "message"), MANIFEST)
def test_a_manifest_that_says_nonsense_is_named(artifact: Path, path: str, value: Any, message: str) -> None:
    change = put(path.replace("null", "a\0b"), value) if "!" not in path else None
    rewrite(artifact, "manifest.json", change or (lambda form: form["files"].update({"manifest.json": value})))
    with pytest.raises(CheckError, match=message):
        verify_artifact(artifact)


@pytest.mark.parametrize("name", ["config.json", "verification.json", "model.onnx"])
def test_a_file_that_is_left_out_of_the_list_is_named(artifact: Path, name: str) -> None:
    rewrite(artifact, "manifest.json", lambda form: form["files"].pop(name))
    (artifact / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(CheckError, match=f"does not list {name}|config.json .* has"):
        verify_artifact(artifact)


@pytest.mark.parametrize("name", ["config.json", "verification.json"])
def test_a_file_that_every_artifact_has_is_missed(artifact: Path, name: str) -> None:
    rewrite(artifact, "manifest.json", lambda form: form["files"].pop(name))
    (artifact / name).unlink()
    with pytest.raises(CheckError, match=f"does not list {name}"):
        check_artifact(artifact)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "adapter_config.json", "model.onnx.data", "model-00002.safetensors", "library.so", "m/a.py"],
)
def test_a_file_that_something_would_load_must_be_listed(artifact: Path, name: str) -> None:
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_text("{}")
    with pytest.raises(CheckError, match=f"does not list {name}; remove it"):
        verify_artifact(artifact)


def test_other_files_may_lie_there(artifact: Path) -> None:
    for name in ("CHANGES.md", ".gitattributes", "notes.txt"):
        (artifact / name).write_text("mine")
    assert check_artifact(artifact).unlisted == (".gitattributes", "CHANGES.md", "notes.txt")


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "verification.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "dangling"])
def test_only_regular_files_are_opened(artifact: Path, name: str, kind: str) -> None:
    path = artifact / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("nowhere")
    with pytest.raises(BitlowerError, match=rf"{name}|is not an artifact \("):
        registry.verify_artifact(artifact)


def test_links_to_files_that_are_right_are_followed(artifact: Path, tmp_path: Path) -> None:
    """As the Hub's own cache lays a model out."""
    (artifact / "config.json").rename(tmp_path / "blob")
    (artifact / "config.json").symlink_to(tmp_path / "blob")
    assert check_artifact(artifact).count == 3


def test_folders_of_others_have_no_manifest_of_ours(sound: Path, tmp_path: Path) -> None:
    assert is_artifact(sound)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "config.json").write_text("{}")
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / ("x" * 5000))
    check_if_artifact(tmp_path)
    (tmp_path / "verification.json").write_text("{}")
    with pytest.raises(CheckError, match=r"manifest\.json in .* is damaged"):
        check_if_artifact(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_any_change_of_a_record_is_read_or_refused(sound: Path, data: st.DataObject) -> None:
    form = json.loads((sound / "verification.json").read_text())
    place: Any = form
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    with suppress(CheckError):
        Verification.from_dict(copy.deepcopy(form))


def selftest() -> SelfTest:
    batch = {"x": torch.ones(2, 3), "past": torch.zeros(2, 0, 4)}
    outputs = {"y": np.arange(100.0).reshape(2, 50), "z": np.zeros((2, 3))}
    form = json.loads(json.dumps(make_selftest(batch, outputs).to_dict()))
    return parsed(SelfTest, form, "self-test")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"y": lambda y: 2 * y}, "the output y has the root mean square 115, 57.3 was recorded"),
        ({"y": lambda y: -y}, "the output y has the cosine -1 to"),
        ({"y": lambda y: y * np.nan}, "the output y has the cosine nan to"),
        ({"y": lambda y: y[:1]}, r"the output y has the shape \[1, 50\], not \[2, 50\]"),
        ({"z": lambda z: z + 1}, "the output z has the cosine 0 to"),
        ({"z": None}, "the model gives no z"),
        ({"more": lambda _: np.ones(1)}, "the self-test expects nothing of the output more"),
    ],
)
def test_a_selftest_compares_every_output_in_shape_direction_and_size(results: Form, message: str) -> None:
    right = {"y": np.arange(100.0).reshape(2, 50), "z": np.zeros((2, 3))}
    assert run_selftest(selftest(), lambda batch: right) == {"y": pytest.approx(1.0), "z": 1.0}
    wrong = {name: change and change(right.get(name)) for name, change in results.items()}
    found = {name: value for name, value in (right | wrong).items() if value is not None}
    with pytest.raises(CheckError, match=message):
        run_selftest(selftest(), lambda batch: found)


def test_a_model_that_fails_on_the_selftest_is_named() -> None:
    def run(batch: Any) -> Any:
        assert {name: tuple(value.shape) for name, value in batch.items()} == {"x": (2, 3), "past": (2, 0, 4)}
        raise RuntimeError("first line\nsecond")

    with pytest.raises(CheckError, match=r"the model does not run on the self-test's inputs: first line$"):
        run_selftest(selftest(), run)


def test_verify_ends_in_one_line_whatever_a_backend_raises(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise MemoryError("too much\nof it")

    monkeypatch.setattr(OnnxQdq, "verify", fail)
    with pytest.raises(CheckError, match=r"copy is damaged: MemoryError: too much$"):
        registry.verify_artifact(artifact)


def kinds() -> dict[str, Any]:
    """A record of every kind, made by hand."""
    pytest.importorskip("tvm")
    from bitlower.backends.checkpoint.verify import record as checkpoint
    from bitlower.backends.tvm_kernels.library import files as library_files
    from bitlower.backends.tvm_kernels.verify import record as library

    layer = checkpoint.LayerCheck("a.b", 4, 64, 0.25, 0, {"codes": "00"})
    output = checkpoint.OutputCheck("logits", 0.5, 0.125, 0.5, 1.0, 0.25)
    kernel = library.KernelError("fused_linear", 2, 64, 0.5, 64, 1.0, 0.5, 0.0, 0.0)
    error = OutputError("logits", 0.5, 0.125, 0.5, 1.0, 0.25)
    value = library_files.Value("x", "float32", ("batch", 8))
    return {
        "checkpoint": checkpoint.Verification(
            "gptq-v2", "float16", 1, 8, (layer,), 0.0, (output,), "transformers", {"torch": "2"}, Unseen("")
        ),
        "library": library.Verification(
            {"target": "llvm"},
            1,
            8,
            (error,),
            (kernel,),
            0.0,
            {"expected": {"linear": 2}, "found": {"linear": 2}},
            selftest(),
            Unseen("", selftest()),
        ),
        "signature": library_files.Signature(
            "llvm",
            "",
            "other",
            {"main": library_files.Function((value,), (value,))},
            library_files.Operators({"linear": 2}, {"fused_linear": 2}, {"why": ("%linear",)}),
        ),
    }


@pytest.mark.parametrize("kind", ["checkpoint", "library", "signature"])
def test_every_entry_of_a_record_is_held_to_its_type(kind: str) -> None:
    record = kinds()[kind]
    form = record.to_dict() if hasattr(record, "to_dict") else dataclasses.asdict(record)
    form = json.loads(json.dumps(form))
    assert parsed(type(record), form, "record") == record
    for field in dataclasses.fields(record):
        for wrong in ({"a": []}, [[]], None):
            with pytest.raises(CheckError, match=rf"^record is damaged: {field.name}[.:]"):
                parsed(type(record), form | {field.name: wrong}, "record")
        with pytest.raises(CheckError, match=f"^record is damaged: {field.name}: field required$"):
            parsed(type(record), {key: value for key, value in form.items() if key != field.name}, "record")
