"""A program becomes a folder that is verified, loaded without the program, and computes the same."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.artifact.manifest import describe_file
from bitlower.backends.tvm_kernels import (
    Target,
    TvmKernels,
    compile_program,
    export,
    is_library,
    load_library,
    verify,
)
from bitlower.backends.tvm_kernels import target as targets
from bitlower.backends.tvm_kernels.library import files as library_files
from bitlower.backends.tvm_kernels.verify import compare
from bitlower.backends.tvm_kernels.verify.record import Verification
from bitlower.backends.tvm_kernels.verify.trace import trace
from bitlower.frontends import load
from bitlower.ir import BitlowerError, CheckError, Level, Program, get_tensor, kernels, set_tensor
from bitlower.passes import Context, PassManager, parse_pipeline

FILES = {
    "library.so",
    "library.json",
    "verification.json",
    "config.json",
    "manifest.json",
    "tokenizer.json",
    "README.md",
}


def tokens(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.fixture(scope="module")
def program(lowered: Callable[..., Program]) -> Program:
    """A tiny decoder with weights of 4 bits and a tokenizer."""
    made = PassManager(parse_pipeline("fuse")).run(lowered("llama-tied", "W4A16-g16"), Context())
    made.assets = {"tokenizer.json": b"{}"}
    return made


@pytest.fixture(scope="module")
def written(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    report = export(program, folder, batches=[tokens(3, 9), tokens(1, 20)], provenance={"seed": 3})
    form = report.to_dict()
    assert form["operators"]["compiled"]["fused_linear"] > 4
    assert form["files"]["library.so"] > 10_000
    summary = form["verification"]["summary"]
    assert summary["output_relative_error"] < 1e-5  # float32 sums; a code that is turned over makes 1e-3
    assert summary["kernel_error"] < 5e-6
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
    listed["files"][path.name] = describe_file(path)
    manifest.write_text(json.dumps(listed))


def test_a_loaded_library_decodes_as_the_program_does(program: Program, written: Path) -> None:
    library = load_library(written)
    assert (library.inputs, library.outputs) == (program.inputs, program.outputs)
    assert library.program.config["vocab_size"] == program.config["vocab_size"]
    assert library.program.assets == program.assets
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


def test_the_folder_is_whole_and_verified(program: Program, written: Path) -> None:
    assert is_library(written)
    assert not is_library(written.parent)
    assert {path.name for path in written.iterdir()} == FILES
    report = verify(written).to_dict()
    assert min(*report["selftest"].values(), *report["unseen"].values()) > 0.999999
    assert report["files"] == len(FILES) - 1
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["backend"] == "tvm-kernels"
    assert manifest["provenance"] == {"seed": 3}
    assert manifest["backend_options"] == {"target": str(targets.host_target()), "activations": "float32"}
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("bitlower", "tvm-kernels")
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4}
    verification = Verification.read(written)
    assert verification.batches == 6  # a small part, that in two steps from a cache, both batches, and other sizes
    assert verification.unseen.sizes == "batch 4, sequence 7"
    assert verification.exposing == 0
    linears = [node for node in program.graph.nodes if node.target is kernels.fused_linear]
    assert {row.kind: row.kernels for row in verification.kernels}["fused_linear"] == len(linears)


def test_equal_programs_give_equal_bytes(program: Program, written: Path, tmp_path: Path) -> None:
    library_files.write_library(program, tmp_path, targets.host_target())
    assert (tmp_path / "library.so").read_bytes() == (written / "library.so").read_bytes()


def test_faults_are_found(folder: Path) -> None:
    library = load_library(folder)
    with pytest.raises(BitlowerError, match="the input 'attention_mask' is missing"):
        library(input_ids=tokens(1, 3)["input_ids"])
    edit(folder / "verification.json", lambda form: form["selftest"]["outputs"]["logits"]["values"].reverse())
    with pytest.raises(CheckError, match=r"the output logits has the cosine .* recorded at export"):
        verify(folder)
    edit(folder / "verification.json", lambda form: form.pop("selftest"))
    with pytest.raises(CheckError, match=r"verification\.json is damaged: selftest: field required"):
        verify(folder)
    edit(folder / "library.json", lambda form: form.update(processor="z80"))
    with pytest.raises(BitlowerError, match=r"holds code for z80, and this is .*export for the target `llvm`"):
        load_library(folder)
    edit(folder / "library.json", lambda form: form["functions"]["main"].pop("inputs"))
    with pytest.raises(CheckError, match=r"library\.json in .* is damaged: functions\.main\.inputs: field required"):
        load_library(folder)


def test_changed_and_missing_files_are_found(folder: Path) -> None:
    (folder / "library.so").write_bytes(b"no library")
    with pytest.raises(CheckError, match=r"library\.so in .* does not load"):
        library_files.load_library(folder)
    for take in (load_library, verify):
        with pytest.raises(CheckError, match=r"library\.so in .* the manifest says"):
            take(folder)
    (folder / "library.so").unlink()
    with pytest.raises(CheckError, match=r"library\.so is missing"):
        load_library(folder)


def negated(program: Program) -> Program:
    """A program one of whose merged linears has scales of the wrong sign."""
    wrong = program.clone()
    scale = next(node for node in wrong.graph.nodes if node.kwargs.get("merged_n")).args[2]
    set_tensor(wrong.module, "negated", -get_tensor(wrong.module, scale.target))
    scale.target = "negated"
    return wrong


def test_a_library_that_computes_something_else_is_not_exported(
    program: Program, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is named."""
    before = {name: tensor.clone() for name, tensor in program.tensors()}
    monkeypatch.setattr(
        compare,
        "compile_program",
        lambda given, target, **options: compile_program(negated(given), target, **options),
    )
    with pytest.raises(CheckError, match=r"is not its program: %fused_linear\w* \(fused_linear in model\.layers\.0"):
        compare.verify_export(program, written, [tokens(2, 6)], target=targets.host_target())
    assert all(torch.equal(before[name], tensor) for name, tensor in program.tensors())
    with pytest.raises(BitlowerError, match="without a batch of inputs"):
        compare.verify_export(program, written, [], target=Target.LLVM)


@pytest.mark.parametrize(("activations", "factor"), [("float32", 1.001), ("float16", 1.02)])
def test_a_small_fault_of_the_deployed_library_alone_is_found(
    program: Program, activations: str, factor: float
) -> None:
    """Its outputs must be those of the library that shows its kernels; Programs stand in for both."""

    def check(factor: float) -> None:
        def deployed(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: value * factor for name, value in program(**batch).items()}

        comparison = compare.Comparison(program, deployed, trace(program), activations)
        comparison.run(tokens(2, 6))
        comparison.check()

    check(1 + (factor - 1) / 50)
    with pytest.raises(CheckError, match=r"an output is 0\.0\d+ standard deviations off what it is when the kernels"):
        check(factor)


def test_convolutions_run_in_float_and_round_rows_of_one_width() -> None:
    program = load(torch.nn.Conv1d(3, 4, 3).eval(), example_inputs={"input": torch.randn(2, 3, 8)})
    weights, both = (
        PassManager(parse_pipeline(f"quantize{{scheme={scheme}}}")).run(program, Context())
        for scheme in ("W8A16", "W8A8")
    )
    TvmKernels().check_fits(weights)
    with pytest.raises(BitlowerError, match=r"rows of one width, and input\w*, the input of a convolution, has"):
        TvmKernels().check_fits(both)


def test_programs_that_do_not_fit_are_refused(program: Program, lowered: Callable[..., Program]) -> None:
    for level, missing in ((Level.INTEGER, "`fuse`"), (Level.SIMULATED, "`lower-integer` and `fuse`")):
        with pytest.raises(
            BitlowerError, match=f"it takes fused programs; this is {level}; end the passes with {missing}"
        ):
            TvmKernels().check_level(level)
    TvmKernels().check_level(Level.FUSED)
    TvmKernels().check_program(program)
    wrong = lowered("llama")
    TvmKernels().check_program(wrong)
    node = next(node for node in wrong.graph.nodes if node.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.erfinv.default
    with pytest.raises(
        BitlowerError, match=r"%silu\w* in model\.layers\.0\.mlp.*: there is no converter for aten\.erfinv"
    ):
        TvmKernels().check_program(wrong)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitlowerError, match="target is lvm; it takes one of host, llvm"):
        TvmKernels("lvm")  # type: ignore[arg-type]
    assert TvmKernels().resolve() is targets.host_target()
    assert TvmKernels("llvm").resolve() is Target.LLVM
    monkeypatch.setattr(targets, "host_target", lambda: Target.LLVM)
    with pytest.raises(BitlowerError, match="does not run llvm-avx512-vnni, and what was not run is not verified"):
        TvmKernels(target="llvm-avx512-vnni").check_host()
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BitlowerError, match="no C compiler is found"):
        TvmKernels(target="llvm").check_host()


def test_ids_outside_the_vocabulary_stand_for_the_nearest_one(program: Program, written: Path) -> None:
    """No other memory is read."""
    library, batch = load_library(written), tokens(1, 4)
    outside = library(**batch | {"input_ids": torch.tensor([[-1, 5, 1 << 40, 96]])})
    inside = library(**batch | {"input_ids": torch.tensor([[0, 5, 95, 95]])})
    assert torch.equal(outside["logits"], inside["logits"])


class RunningSum(torch.nn.Module):
    """A linear of sums along the rows, as position ids of RoBERTa are made of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cumsum(mask.int(), 1).type_as(mask).float())


def test_running_sums_of_whole_numbers() -> None:
    torch.manual_seed(0)
    batch = {"mask": torch.randint(0, 2, (3, 8))}
    made = load(RunningSum().eval(), example_inputs=batch)
    made = PassManager(parse_pipeline("clean,quantize{scheme=W8A16},rtn,lower-integer,fuse")).run(made, Context())
    [expected], [found] = made(**batch).values(), compile_program(made)(**batch).values()
    torch.testing.assert_close(found, expected)


class Picked(torch.nn.Module):
    """Columns of a linear by their numbers, some of which count from the end, as heads of Falcon are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.linear(x).view(-1, 3, 4)
        places = torch.tensor([[-1], [0]]), torch.tensor([-2, 1, 3])
        return heads[:, places[0], places[1]], heads[:, torch.tensor([-2])]


def test_indices_count_from_either_end_of_an_axis() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(5, 8)}
    made = load(Picked().eval(), example_inputs=batch)
    made = PassManager(parse_pipeline("clean,quantize{scheme=W8A16},rtn,lower-integer,fuse")).run(made, Context())
    for expected, found in zip(made(**batch).values(), compile_program(made)(**batch).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_time_of_each_kernel_is_seen(written: Path) -> None:
    """Kernels of every family, as often as the code calls them."""
    times = TvmKernels.kernel_times(written)
    calls = Counter[str]()
    for kernel in times:
        assert kernel.microseconds > 0
        if family := re.match(r"bitlower_(\w+?)_", kernel.kernel):
            calls[family[1]] += kernel.calls
    expected = json.loads((written / "verification.json").read_text())["calls"]["expected"]
    assert calls == expected
    assert not [kernel for kernel in times if kernel.kernel.startswith("vm.")]
