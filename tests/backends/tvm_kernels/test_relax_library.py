"""A compiled program as a folder: it is loaded without the program, computes the same, and is checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import _relax_library
from bitlower.backends.tvm_kernels._relax_library import (
    LIBRARY,
    SIGNATURE,
    VERIFICATION,
    load_library,
    verify_library,
    write_library,
)
from bitlower.backends.tvm_kernels._spec import Target
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.passes import Context, PassManager, parse_pipeline


def tokens(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.fixture(scope="module")
def program(lowered: Callable[..., Program]) -> Program:
    """A tiny decoder with weights of 4 bits."""
    return PassManager(parse_pipeline("fuse")).run(lowered("llama-tied", "W4A16-g16"), Context())


@pytest.fixture(scope="module")
def written(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    program = program.clone()
    program.assets = {"tokenizer.json": b"{}"}
    report = write_library(program, folder, [tokens(3, 9), tokens(1, 20)], provenance={"seed": 3})
    assert set(report.outputs) == {spec.name for spec in program.outputs}
    assert max(row["relative"] for row in report.outputs.values()) < 5e-6
    assert report.files[LIBRARY] > 10_000
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file, and what the manifest says about it."""
    form = json.loads(path.read_text())
    change(form)
    path.write_text(json.dumps(form))
    manifest = path.with_name("manifest.json")
    listed = json.loads(manifest.read_text())
    listed["files"][path.name] = _relax_library._manifest.describe_file(path)
    manifest.write_text(json.dumps(listed))


def test_a_loaded_library_decodes_as_the_program_does(program: Program, written: Path) -> None:
    library = load_library(written)
    batch = tokens(2, 6, seed=4)
    with torch.no_grad():
        expected = program(**batch)
    found = library(**batch)
    past = {name.replace("present", "past_key_values"): value for name, value in found.items() if "present" in name}
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    step = {
        "input_ids": torch.tensor([[5], [7]]),
        "attention_mask": mask,
        "position_ids": mask.sum(1, keepdim=True) - 1,
    }
    with torch.no_grad():
        expected_step = program(**step, **past)
    for first, second in ((expected, found), (expected_step, library(**step, **past))):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert (second[name] - value).abs().max() < 5e-6 * value.std()


def test_the_folder_is_whole_and_verified(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {LIBRARY, SIGNATURE, VERIFICATION, "config.json", "manifest.json", "tokenizer.json"}
    cosines = verify_library(written)
    assert min(cosines.values()) > 0.999999
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["backend"] == "tvm-kernels"
    assert manifest["provenance"] == {"seed": 3}
    assert set(manifest["files"]) == names - {"manifest.json"}


def test_faults_are_found(folder: Path) -> None:
    library = load_library(folder)
    with pytest.raises(BitlowerError, match="the input 'attention_mask' is missing"):
        library(input_ids=tokens(1, 3)["input_ids"])
    edit(folder / VERIFICATION, lambda form: form["selftest"]["outputs"]["logits"].reverse())
    with pytest.raises(CheckError, match=r"the output logits of the library has the cosine .* recorded at export"):
        verify_library(folder)
    edit(folder / VERIFICATION, lambda form: form.pop("selftest"))
    with pytest.raises(CheckError, match=r"verification\.json in .* is damaged: KeyError\('selftest'\)"):
        verify_library(folder)
    edit(folder / SIGNATURE, lambda form: form.update(processor="z80"))
    with pytest.raises(BitlowerError, match=r"holds code for z80, and this is .*export for the target `llvm`"):
        verify_library(folder)
    edit(folder / SIGNATURE, lambda form: form.pop("inputs"))
    with pytest.raises(CheckError, match=r"library\.json in .* is damaged: KeyError\('inputs'\)"):
        load_library(folder)


def test_changed_and_missing_files_are_found(folder: Path) -> None:
    (folder / LIBRARY).write_bytes(b"no library")
    with pytest.raises(CheckError, match=r"library\.so in .* does not load"):
        load_library(folder)
    with pytest.raises(CheckError, match=r"library\.so in .* the manifest says"):
        verify_library(folder)
    (folder / LIBRARY).unlink()
    with pytest.raises(CheckError, match=r"library\.so is missing"):
        load_library(folder)


def test_a_library_that_computes_something_else_is_not_exported(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_program = _relax_library.compile_program

    def wrong(given: Program, target: Target) -> object:
        """The library of a program whose scales are in the wrong order."""
        given = given.clone()
        kernel = next(node for node in given.graph.nodes if node.kwargs.get("rows"))
        name = kernel.args[2].target
        scale = given.module.get_buffer(name)
        owner = given.module.get_submodule(name.rpartition(".")[0])
        owner.scale = -scale
        try:
            return compile_program(given, target)
        finally:
            owner.scale = scale

    monkeypatch.setattr(_relax_library, "compile_program", wrong)
    with pytest.raises(CheckError, match=r"of the library has the cosine .* to the program's"):
        write_library(program, tmp_path, [tokens(2, 6)])
    with pytest.raises(BitlowerError, match="without a batch of inputs"):
        write_library(program, tmp_path, [])
