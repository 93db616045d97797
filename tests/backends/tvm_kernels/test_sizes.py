"""A library in which a size is baked is refused; sizes that nothing had before show it."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.artifact.manifest import describe_file
from bitlower.backends.tvm_kernels import Target, compile_program, export, verify
from bitlower.backends.tvm_kernels import target as targets
from bitlower.backends.tvm_kernels.library import files as library_files
from bitlower.backends.tvm_kernels.library.library import Code
from bitlower.backends.tvm_kernels.verify import compare
from bitlower.backends.tvm_kernels.verify.trace import trace
from bitlower.frontends import load
from bitlower.ir import CheckError, Program
from bitlower.passes import Context, PassManager, parse_pipeline

NEW = "which tracing and calibration did not have"
helpers = runpy.run_path(str(Path(__file__).with_name("programs.py")))
tokens = helpers["tokens"]


@pytest.fixture(scope="module")
def bert() -> Program:
    """A tiny encoder; its batches here have 2 rows of 9 tokens, as what the self-test cuts from them."""
    program: Program = helpers["fused"]("bert", "W8A8", layers=1)
    return program


def batches(program: Program) -> list[dict[str, torch.Tensor]]:
    return [tokens(program, 2, 9, seed) for seed in (4, 5)]


@pytest.fixture(scope="module")
def written(bert: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of :func:`bert`; not to be written to."""
    folder = tmp_path_factory.mktemp("sizes")
    report = export(bert, folder, batches=batches(bert))
    assert report.verification.summary()["unseen_sizes"] == "batch 3, sequence 7"
    return folder


def bound(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Let what is written be a library in which constants stand for symbolic dimensions."""

    def compiled(program: Program, target: Target, **options: Any) -> Any:
        return compile_program(program, target, **options, sizes=sizes)

    monkeypatch.setattr(library_files, "compile_program", compiled)


@pytest.mark.parametrize("sizes", [pytest.param({"batch": 2}, marks=pytest.mark.nightly), {"sequence": 9}])
def test_a_library_that_has_the_sizes_of_its_batches_baked_in_is_refused(
    bert: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    bound(monkeypatch, **sizes)
    with pytest.raises(CheckError, match=rf"^at batch 3, sequence 7, {NEW}: the library does not run: .*\((3|7) vs\."):
        export(bert, tmp_path, batches=batches(bert))
    assert not (tmp_path / "verification.json").exists()


def test_what_verify_runs_has_other_sizes_too(
    bert: Program, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify(written).to_dict()
    assert report["unseen_sizes"] == "batch 3, sequence 7"
    assert set(report["unseen"]) == {spec.name for spec in bert.outputs}
    assert min(report["unseen"].values()) > 0.999999
    recorded = json.loads((written / "verification.json").read_text())["unseen"]["selftest"]
    assert torch.tensor(recorded["inputs"]["input_ids"]["values"]).shape == (3, 7)
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    bound(monkeypatch, batch=2, sequence=9)
    library_files.write_library(bert, folder, targets.host_target(), "float32")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= {name: describe_file(folder / name) for name in ("library.so", "library.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckError, match=rf"^at batch 3, sequence 7, {NEW}: the model does not run on the self-test's"):
        verify(folder)


def with_last(program: Program, *changes: tuple[Any, tuple[Any, ...]]) -> Program:
    """``program`` whose first output goes through further operators, each with these arguments after it."""
    changed = program.clone()
    output = changed.graph.output_node()
    first, *others = output.args[0]  # type: ignore[misc]
    with changed.graph.inserting_before(output):
        for target, arguments in changes:
            meta, first = first.meta, changed.graph.call_function(target, (first, *arguments))
            first.meta = dict(meta)
    output.args = ((first, *others),)
    changed.recompile()
    return changed


def test_a_program_that_has_the_sizes_of_its_batches_baked_in_is_refused(bert: Program, tmp_path: Path) -> None:
    program = with_last(bert, (torch.ops.aten.view.default, ([2, 9, 32],)))
    with pytest.raises(CheckError, match=rf"^the program itself fails at batch 3, sequence 7, {NEW}: shape '\[2, 9"):
        export(program, tmp_path, batches=batches(program))
    with pytest.raises(CheckError, match=rf"^the program itself fails at batch 3, sequence 7, {NEW}: shape '\[2, 9"):
        compare.expect(program, batches(program), Code(SimpleNamespace(as_text=str), Target.CUDA))


def mean_by(length: int) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """A sum over the tokens and a division by their number, as it was when it was traced."""
    return (torch.ops.aten.sum.dim_IntList, ([1], True)), (torch.ops.aten.div.Scalar, (length,))


def test_a_constant_that_was_a_size_is_found_where_every_shape_is_right(bert: Program) -> None:
    """A Program with the length of its batches in it stands in for the library, another for that which is traced."""
    mean = with_last(bert, (torch.ops.aten.mean.dim, ([1], True)))
    library = with_last(bert, *mean_by(9))
    for deployed, traced in ((library, mean), (mean, library)):
        comparison = compare.Comparison(mean, deployed, trace(traced))
        with pytest.raises(CheckError, match=rf"^at batch 3, sequence 7, {NEW}: the library is not its program: "):
            comparison.run_all(batches(bert))
    comparison = compare.Comparison(mean, mean, trace(mean))
    comparison.run_all(batches(bert))
    _, unseen = comparison.selftests()
    assert unseen.sizes == "batch 3, sequence 7"


def test_where_the_library_does_not_run_the_program_says_what_other_sizes_give(bert: Program) -> None:
    unseen = compare.expect(bert, batches(bert), Code(SimpleNamespace(as_text=str), Target.CUDA)).unseen
    assert unseen.sizes == "batch 3, sequence 7"

    def run(program: Program) -> Any:
        return lambda batch: {name: value.detach().numpy() for name, value in program(**batch).items()}

    assert min(unseen.check(run(bert)).values()) == pytest.approx(1)
    with pytest.raises(CheckError, match=rf"^at batch 3, sequence 7, {NEW}: the model does not run"):
        unseen.check(run(with_last(bert, (torch.ops.aten.view.default, ([2, 9, 32],)))))


class Rows(torch.nn.Module):
    """A linear of as many rows as it has places for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.places = torch.nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.places)


def test_where_all_sizes_are_fixed_it_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(3, 8)}
    program = load(Rows().eval(), example_inputs=batch)
    assert program.inputs[0].type.shape == (3, 8)
    program = PassManager(parse_pipeline("clean,quantize{scheme=W8A16},rtn,lower-integer,fuse")).run(program, Context())
    report = export(program, tmp_path, batches=[batch])
    assert report.verification.unseen.to_dict() == {"sizes": "none: all sizes are fixed", "selftest": None}
    found = verify(tmp_path).to_dict()
    assert (found["unseen"], found["unseen_sizes"]) == ({}, "none: all sizes are fixed")
