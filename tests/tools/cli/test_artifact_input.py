"""Whatever loads an artifact checks its files first: nothing that was changed, cut or added is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitlower
from bitlower import frontends
from bitlower.ir import BitlowerError, CheckError
from bitlower.tools.cli import main
from bitlower.tools.evaluation import language_model, runners

Load = Callable[[Path], Any]
LOADERS: dict[str, tuple[Load, int]] = {
    "load": (lambda folder: bitlower.load(folder), 1),
    "eval": (runners.open_runner, 2),
    "language_model": (language_model.language_model, 2),
}
BACKENDS = {"onnx": "onnx-qdq", "library": "tvm-kernels", "checkpoint": "checkpoint"}
NAMES = {"onnx": "model.onnx", "library": "library.so", "checkpoint": "model.safetensors"}


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What an export of that kind leaves, as far as files and hashes go; no runtime would take them."""
    texts = {NAMES[request.param]: "code", "verification.json": "{}"}
    texts["config.json"] = json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}})
    texts |= {"library.json": "{}"} if request.param == "library" else {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = {n: {"bytes": len(t), "sha256": hashlib.sha256(t.encode()).hexdigest()} for n, t in texts.items()}
    program = {"source": "", "task": "", "level": "", "passes": [], "digest": "", "inputs": [], "outputs": []}
    manifest = {
        "backend": BACKENDS[request.param], "backend_options": {}, "provenance": {}, "versions": {}, "program": program,
        "tensors": [], "files": files, "bytes": 0, "float_bytes": 0,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a runtime was asked to load; none does."""
    seen: list[str] = []

    def stand_in(name: str) -> Callable[..., Any]:
        def take(*_: Any, **__: Any) -> Any:
            seen.append(name)
            raise RuntimeError(f"{name} was asked")

        return take

    monkeypatch.setattr("onnxruntime.InferenceSession", stand_in("onnxruntime"))
    monkeypatch.setattr("tvm.runtime.load_module", stand_in("tvm"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", stand_in("transformers"))
    for module in (runners, language_model, frontends):
        monkeypatch.setattr(module, "load", stand_in("frontend"))
    return seen


def main_file(folder: Path) -> Path:
    return next(folder / name for name in NAMES.values() if (folder / name).exists())


def other_bytes(folder: Path) -> None:
    main_file(folder).write_text("edoc")


def cut(folder: Path) -> None:
    main_file(folder).write_text("cod")


def added(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def unlisted(folder: Path) -> None:
    form = json.loads((folder / "manifest.json").read_text())
    del form["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(form))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", [other_bytes, cut, added, unlisted], ids=lambda damage: damage.__name__)
def test_nothing_is_loaded_of_a_damaged_artifact(
    folder: Path, damage: Callable[[Path], None], loader: str, loaded: list[str]
) -> None:
    load, code = LOADERS[loader]
    damage(folder)
    with pytest.raises(BitlowerError, match=r"was changed|has 3 bytes, the manifest says 4|does not list") as info:
        load(folder)
    assert (info.value.exit_code, loaded) == (code, [])


def test_a_library_needs_its_manifest(folder: Path, loaded: list[str]) -> None:
    if not (folder / "library.so").exists():
        pytest.skip("others' folders have no manifest, and hold no code")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckError, match=r"manifest\.json is missing"):
        bitlower.load(folder)
    assert loaded == []


@pytest.mark.parametrize("loader", ["eval", "language_model"])
def test_a_sound_artifact_is_given_to_its_runtime(folder: Path, loader: str, loaded: list[str]) -> None:
    with pytest.raises((BitlowerError, RuntimeError)):
        LOADERS[loader][0](folder)
    assert loaded or (folder / "library.so").exists()  # whose signature is empty here


def test_the_command_line_ends_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_bytes(folder)
    assert main(["eval", str(folder), "--task", "text-generation", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was changed: its hash is not the manifest's" in error
