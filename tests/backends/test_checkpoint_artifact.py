"""A checkpoint on the disk is what was exported, or the difference is named; its Program is not needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitlower.backends.checkpoint import export, verify
from bitlower.backends.checkpoint.format import Packed, Weight
from bitlower.backends.checkpoint.verify.compare import check_weight
from bitlower.backends.checkpoint.verify.record import Verification
from bitlower.ir import BitlowerError, CheckError, Program

Lowered = Callable[..., Program]
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["compressed-tensors", "gptq-v2"])
def artifact(request: pytest.FixtureRequest, lowered: Lowered, prompts, tmp_path: Path) -> Path:
    export(lowered("llama", "W4A16-g32-asym"), tmp_path, batches=prompts, format=request.param)
    return tmp_path


def relist(folder: Path, name: str) -> None:
    """Let the manifest say what a changed file is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    form = json.loads((folder / name).read_text())
    change(form)
    (folder / name).write_text(json.dumps(form))
    relist(folder, name)


def edit_tensor(folder: Path, names: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(f"{LAYER}.{name}" for name in names if f"{LAYER}.{name}" in tensors)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, folder / "model.safetensors", {"format": "pt"})
    relist(folder, "model.safetensors")


def test_a_sound_artifact_passes(artifact: Path):
    (artifact / "notes.txt").write_text("mine")
    report = verify(artifact)
    assert (report.files, report.layers, report.unlisted) == (5, 14, ("notes.txt",))
    assert report.codes == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3)
    assert report.format in json.dumps(report.to_dict())


def test_files_are_those_of_the_manifest(artifact: Path):
    data = bytearray((artifact / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (artifact / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckError, match=r"model.safetensors .* was changed"):
        verify(artifact)
    (artifact / "model.safetensors").unlink()
    with pytest.raises(CheckError, match=r"model\.safetensors is missing"):
        verify(artifact)
    with pytest.raises(BitlowerError, match="there is no artifact"):
        verify(artifact / "nowhere")


PACKED, SCALES, ZEROS = ("weight_packed", "qweight"), ("weight_scale", "scales"), ("weight_zero_point", "qzeros")


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (PACKED, lambda t: t ^ 1, "the codes of"),
        (SCALES, lambda t: t * 2, "the scales of"),
        (SCALES, lambda t: t / 0, "a scale of .* is not finite"),
        (ZEROS, lambda t: t ^ 1, "the zero points of"),
        (SCALES, lambda t: t[:1], r"do not make groups of 32|not consecutive"),
        (PACKED, lambda t: t.short(), "cannot be unpacked"),
    ],
)
def test_each_part_of_a_layer_is_compared(artifact: Path, names, change, message: str):
    edit_tensor(artifact, names, change)
    with pytest.raises(CheckError, match=message) as caught:
        verify(artifact)
    assert LAYER in str(caught.value)


def test_a_configuration_that_says_otherwise_is_found(artifact: Path):
    def narrow(form: dict[str, Any]) -> None:
        config = form["quantization_config"]
        groups = config.get("config_groups", {"group_0": {"weights": config}})
        arguments = groups["group_0"]["weights"]
        arguments["num_bits" if "num_bits" in arguments else "bits"] = 8

    edit_json(artifact, "config.json", narrow)
    with pytest.raises(CheckError, match=r"cannot be unpacked|do not make groups|not consecutive"):
        verify(artifact)


def test_zero_points_that_a_configuration_denies_are_found(lowered: Lowered, prompts, tmp_path: Path):
    export(lowered("llama", "W4A16-g32-asym"), tmp_path, batches=prompts, format="gptq-v2")
    edit_json(tmp_path, "config.json", lambda form: form["quantization_config"].update(sym=True))
    with pytest.raises(CheckError, match=r"says that .* is symmetric; its zero points are not the middle"):
        verify(tmp_path)


def test_fewer_groups_than_the_columns_need_are_found():
    weight = Weight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8))
    assert check_weight("up", Packed(4, 64, True), weight) == check_weight("up", Packed(4, -1, True), weight)
    with pytest.raises(CheckError, match=r"up has codes \[4, 64\], scales \[4, 1\] .* do not make groups of 32"):
        check_weight("up", Packed(4, 32, True), weight)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda form: form.pop("quantization_config"), "is packed in the files or in verification.json"),
        ("config.json", lambda form: form.update(quantization_config={}), "quantization_config in .* is damaged"),
        ("verification.json", lambda form: form.pop("layers"), "verification.json is damaged"),
        ("verification.json", lambda form: form["layers"].pop(), "but not in both"),
        ("verification.json", lambda form: form.update(format="marlin"), "names the unknown format 'marlin'"),
    ],
)
def test_damaged_descriptions_are_named(artifact: Path, name: str, change, message: str):
    edit_json(artifact, name, change)
    with pytest.raises(CheckError, match=message):
        verify(artifact)


def test_verification_is_plain_data_and_back(artifact: Path):
    verification = Verification.read(artifact)
    assert Verification.from_dict(json.loads(json.dumps(verification.to_dict()))) == verification
    assert verification.summary()["codes"] == sum(row.codes for row in verification.layers)
