"""Whole programs for NVIDIA GPUs: their machine code for both architectures, and how it comes into the library."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import torch
import tvm

from bitlower.backends.artifact.selftest import run_selftest
from bitlower.backends.tvm_kernels import Target, TvmKernels, compile_program, export, internals, verify
from bitlower.backends.tvm_kernels.inspect.sass import device_functions
from bitlower.backends.tvm_kernels.library import fatbin as cuda_library
from bitlower.backends.tvm_kernels.library.files import load_library, write_library
from bitlower.backends.tvm_kernels.library.nvcc import find_tool
from bitlower.backends.tvm_kernels.verify.record import Verification
from bitlower.ir import BitlowerError, CheckError

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
fused = _HELPERS["fused"]
MISSING = [tool for tool in ("nvcc", "cuobjdump", "nvdisasm") if find_tool(tool) is None]
MODELS = {
    "encoder": ("bert", "W8A8-full", {"linear": "IMMA", "attention": "IDP.4A", "norm": "SHFL"}),
    "decoder": ("llama", "W4A16-g16", {"linear": "HMMA", "attention": "SHFL", "norm": "SHFL"}),
}
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=f"CUDA libraries are NOT compiled: no {', '.join(MISSING)}")


@needs_nvcc
@pytest.mark.parametrize("name", MODELS)
def test_all_device_functions_of_a_program_compile_without_spills(name: str) -> None:
    model, scheme, instructions = MODELS[name]
    executable = compile_program(fused(model, scheme, layers=1), Target.CUDA).code.executable
    source = str(cuda_library.device_module(executable).inspect_source())
    for architecture in cuda_library.ARCHITECTURES:
        functions = device_functions(source, architecture)
        assert len(functions) > 15
        for function in functions:
            assert function.spills == 0, function.name
            local = {"LDL", "STL"} & set(dict(function.instructions))
            assert not local or function.name.startswith(("tir_sin", "tir_cos")), function.name  # reduce large angles
            assert function.shared <= 48 * 1024
            if function.name.startswith("bitlower_linear") and function.name.endswith("_kernel_1"):
                assert dict(function.instructions).get(instructions["linear"], 0) >= 16, (architecture, function.name)
        for family, instruction in instructions.items():
            found = [dict(f.instructions) for f in functions if f.name.startswith((family, f"bitlower_{family}"))]
            assert max(counts.get(instruction, 0) for counts in found) >= 5, (architecture, family)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A library of a tiny encoder, and its CUDA source."""
    if find_tool("nvcc") is None:
        pytest.skip("CUDA libraries are NOT compiled: no nvcc")
    folder = tmp_path_factory.mktemp("library")
    names, _ = write_library(fused("bert", "W8A8", layers=1), folder, Target.CUDA)
    assert set(names) == {path.name for path in folder.iterdir()} == {"library.so", "library.json", "kernels.cu"}
    return folder / "library.so", (folder / "kernels.cu").read_text()


@needs_nvcc
def test_the_library_holds_code_for_both_architectures(exported: tuple[Path, str], tmp_path: Path) -> None:
    path, source = exported
    code = cuda_library.compile_source(source)
    library = path.read_bytes()
    assert code in library
    assert source.encode() not in library
    (tmp_path / "kernels.fatbin").write_bytes(code)
    machine, later = (
        subprocess.check_output([str(find_tool("cuobjdump")), option, "kernels.fatbin"], cwd=tmp_path, text=True)
        for option in ("--list-elf", "--list-ptx")
    )
    assert [name in machine for name in cuda_library.ARCHITECTURES] == [True, True]
    assert "sm_90" in later


def test_a_library_without_its_gpu_is_not_loaded(exported: tuple[Path, str]) -> None:
    if tvm.cuda().exist:
        pytest.skip("there is a GPU")
    with pytest.raises(BitlowerError, match="code for cuda, and TVM finds no such device here; run it where there is"):
        load_library(exported[0].parent)


def test_functions_and_weights_stay_what_they_were(exported: tuple[Path, str], tmp_path: Path) -> None:
    """But for its code, what TVM packs is the same; changed twice it is what it was."""
    _, source = exported
    executable = compile_program(fused("bert", "W8A8", layers=1), Target.CUDA).code.executable
    pack = tvm.get_global_func("runtime.ModulePackImportsToTensor")
    blob = bytes(pack(executable.mod).numpy())
    changed = internals.with_code(blob, source.encode(), b"machine code")
    assert len(blob) - len(changed) == len(source.encode()) - len(b"machine code") + len(b"cuda") - len(b"fatbin")
    assert internals.with_code(changed, source.encode(), b"other") == changed
    with pytest.raises(CheckError, match="in another way than is known"):
        internals.with_code(blob, b"another source", b"machine code")


def test_without_nvcc_one_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_library, "find_tool", lambda name: None)
    cuda_library.compile_source.cache_clear()
    executable = compile_program(fused("bert", "W8A8", layers=1), Target.CUDA).code.executable
    with pytest.raises(BitlowerError, match="compiled by nvcc, which is not installed; install CUDA"):
        cuda_library.export_cuda(executable, tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_graphs_are_made_of_static_shapes() -> None:
    def text(**sizes: int) -> Any:
        return compile_program(fused("bert", "W8A8", layers=1), Target.CUDA, sizes=sizes).code.executable.as_text()

    assert "cuda_graph.run_or_capture" in text(batch=1, sequence=8)
    assert "cuda_graph" not in text()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@needs_nvcc
def test_an_export_that_was_not_run_expects_what_the_program_gives(tmp_path: Path) -> None:
    if tvm.cuda().exist:
        pytest.skip("there is a GPU")
    program = fused("bert", "W8A8", layers=1)
    report = export(program, tmp_path, batches=[_batch()], target="cuda", unrun=True).to_dict()
    calls = report["verification"]["calls"]
    assert calls["found"] == calls["expected"] == report["operators"]["calls"]
    assert calls["found"]["linear"] > 0
    assert set(report["files"]) >= {"library.so", "library.json", "kernels.cu", "config.json"}
    assert report["verification"]["summary"] == {"not_run": True}
    options = json.loads((tmp_path / "manifest.json").read_text())["backend_options"]
    assert options == {"target": "cuda", "activations": "float16"}
    recorded = Verification.read(tmp_path).selftest
    cosines = run_selftest(
        recorded, lambda batch: {name: value.detach().numpy() for name, value in program(**batch).items()}
    )
    assert set(cosines) == {spec.name for spec in program.outputs}
    assert all(cosine == pytest.approx(1) for cosine in cosines.values())
    with pytest.raises(CheckError, match="cosine"):
        run_selftest(
            recorded, lambda batch: {name: -value.detach().numpy() for name, value in program(**batch).items()}
        )
    with pytest.raises(BitlowerError, match="TVM finds no such device here"):
        verify(tmp_path)


@needs_nvcc
def test_what_cannot_be_run_is_not_written_unless_one_says_so(tmp_path: Path) -> None:
    if tvm.cuda().exist:
        pytest.skip("there is a GPU")
    for refused in (
        lambda: TvmKernels(target="cuda").check_host(),
        lambda: export(fused("bert", "W8A8", layers=1), tmp_path, batches=[_batch()], target="cuda"),
    ):
        with pytest.raises(BitlowerError, match=r"what was not run is not verified; .*unrun: true"):
            refused()
    TvmKernels(target="cuda", unrun=True).check_host()
    with pytest.raises(BitlowerError, match="llvm is run where it is written"):
        TvmKernels(target="llvm", unrun=True).check_host()
    assert not list(tmp_path.iterdir())


def test_without_nvcc_an_export_for_gpus_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "find_tool", lambda name: None)
    with pytest.raises(BitlowerError, match="compiled by nvcc, which is not installed"):
        TvmKernels(target="cuda", unrun=True).check_host()
