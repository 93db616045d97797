"""Encoder-decoders as libraries: one of two functions, verified each alone and together, that writes the targets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import bitlower
from bitlower.backends.artifact.manifest import describe_file
from bitlower.backends.running import StagedModel
from bitlower.backends.tvm_kernels import StagedLibrary, Target, TvmKernels, export, verify
from bitlower.backends.tvm_kernels.library.library import Code
from bitlower.backends.tvm_kernels.verify import compare
from bitlower.ir import BitlowerError, CheckError, Program, kernels, set_tensor
from bitlower.ir.generation import program_stages, write_targets
from bitlower.ir.observe import run
from bitlower.ir.stages import DECODER, ENCODER, split_stages, whole_inputs
from bitlower.passes import Context, PassManager, parse_pipeline

CASES = {
    "whisper": "clean",
    "t5": "clean,quantize{scheme=W4A16-g16},rtn,lower-integer,fuse",
}
SEARCHES = {"greedy": {}, "beams": {"num_beams": 3, "length_penalty": 2.0}}


@pytest.fixture(scope="module", params=CASES)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seq2seq: Any
) -> tuple[str, Program, Path]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    program = PassManager(parse_pipeline(CASES[kind])).run(seq2seq.traced(kind), Context())
    export(program, folder, batches=seq2seq.batches(kind, 2))
    return kind, program, folder


def test_both_together_compute_what_the_program_does(artifact: tuple[str, Program, Path], seq2seq: Any) -> None:
    kind, program, folder = artifact
    library = bitlower.load(folder)
    assert isinstance(library, StagedLibrary)
    assert [spec.name for spec in library.inputs] == [
        spec.name for spec in program.inputs if spec.name != "decoder_attention_mask"
    ]
    (batch,) = seq2seq.batches(kind, 1, padded=False)
    expected = run(program, batch)
    del batch["decoder_attention_mask"]
    found = library(**batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 5e-6 * float(value.std()), name


@pytest.mark.parametrize("search", SEARCHES)
def test_it_writes_what_transformers_does(artifact: tuple[str, Program, Path], seq2seq: Any, search: str) -> None:
    """Of the float model transformers' own model is asked; of another, transformers' search over the Program."""
    kind, program, folder = artifact
    library, read = bitlower.load(folder), seq2seq.source(kind, rows=3, seed=1)
    settings = {"max_new_tokens": 8, "no_repeat_ngram_size": 2, **SEARCHES[search]}
    if kind == "whisper":
        model, settings = seq2seq.model_of(kind), settings | {"min_new_tokens": 6}
        expected = transformers.GenerationMixin.generate(model, **read, do_sample=False, **settings)
        assert torch.equal(library.generate(**read, **settings), expected)
    else:
        options = {"start": torch.full((3, 1), 2), "stops": (), **settings}
        expected = write_targets(program, *program_stages(program), read, **options)
        assert torch.equal(library.generate(**read, **options), expected)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_source_is_read_once_and_its_keys_and_values_stay(
    artifact: tuple[str, Program, Path], seq2seq: Any, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    kind, _, folder = artifact
    library, calls, puts = bitlower.load(folder), Counter[str](), Counter[tuple[int, ...]]()
    call, put = Code.call, Code.put

    def counted(code: Code, function: str, program: Program, inputs: dict[str, Any]) -> dict[str, Any]:
        calls[function] += 1
        return call(code, function, program, inputs)

    def noted(code: Code, value: torch.Tensor, dtype: torch.dtype) -> Any:
        puts[tuple(value.shape)] += value.dim() == 4 and value.numel() > 0
        return put(code, value, dtype)

    monkeypatch.setattr(Code, "call", counted)
    monkeypatch.setattr(Code, "put", noted)
    read, beams = seq2seq.source(kind), SEARCHES[search].get("num_beams", 1)
    library.generate(**read, max_new_tokens=5, stops=(), **SEARCHES[search])
    assert calls == {ENCODER: 1, DECODER: 5}
    length = 50 if kind == "whisper" else 7
    assert puts[2 * beams, 2, length, 8] == 4, "keys and values of two layers, once"
    if beams == 1:
        assert sum(puts.values()) == 4, "the decoder's own cache stays where TVM has it"


def test_the_artifact_is_checked_without_the_program(artifact: tuple[str, Program, Path]) -> None:
    _, program, folder = artifact
    report = verify(folder)
    assert min(*report.selftest.values(), *report.unseen.values()) > 0.999999
    assert set(report.selftest) == {spec.name for spec in program.outputs}
    assert report.unseen_sizes.startswith("batch 3, ")
    recorded = json.loads((folder / "verification.json").read_text())
    assert {row["name"] for row in recorded["outputs"]} == set(report.selftest)
    assert not [name for name in recorded["selftest"]["inputs"] if "past" in name and ".encoder." in name]
    linears = [node for node in program.graph.nodes if node.target is kernels.fused_linear]
    assert {row["kind"]: row["kernels"] for row in recorded["kernels"]}.get("fused_linear", 0) == len(linears)
    assert recorded["summary"]["output_relative_error"] < 5e-6


def test_a_table_that_both_functions_read_lies_there_once(artifact: tuple[str, Program, Path]) -> None:
    kind, program, folder = artifact
    if kind == "whisper":
        pytest.skip("its encoder reads sound")
    (table,) = [tensor for name, tensor in program.tensors() if name.startswith("model/shared.weight")]
    assert (folder / "library.so").read_bytes().count(table.detach().numpy().tobytes()) == 1


def test_functions_that_are_missing_are_named(artifact: tuple[str, Program, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact[2], tmp_path / "copy"))
    for path in (folder / "library.json", folder / "manifest.json"):
        form = json.loads(path.read_text())
        if path.name == "library.json":
            form["functions"].pop(DECODER)
        else:
            form["files"]["library.json"] = describe_file(folder / "library.json")
        path.write_text(json.dumps(form))
    with pytest.raises(CheckError, match=r"library\.json .* its functions are encoder, not main, nor encoder and dec"):
        bitlower.load(folder)


class ProgramStages(StagedModel):
    """Programs in the place of the functions of a library."""

    def __init__(self, stages: dict[str, Program]) -> None:
        self.stages = stages
        encoder, decoder = stages[ENCODER], stages[DECODER]
        outputs = (*decoder.outputs, *encoder.outputs)
        self.program = replace(encoder, inputs=whole_inputs(encoder.inputs, decoder.inputs), outputs=outputs)

    code = None

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return run(self.stages[ENCODER], inputs)

    def decode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return run(self.stages[DECODER], self.stages[DECODER].complete(inputs))


@pytest.mark.parametrize("wrong", ["", ENCODER, DECODER])
def test_each_function_is_compared_kernel_by_kernel(
    seq2seq: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    data = seq2seq.batches("bart", 2)
    passes = parse_pipeline("clean,quantize{scheme=W8A8-token},calibrate,lower-integer,fuse")
    program = PassManager(passes).run(seq2seq.traced("bart"), Context(data, data[:1]))
    stages = split_stages(program)
    if wrong:
        other = program.clone()
        last = [n for n, t in other.tensors() if f"{wrong}.layers" in n and n.endswith("fc2.weight_codes")][-1]
        codes = dict(other.tensors())[last]
        set_tensor(other.module, last.partition("/")[2], -codes)
        stages[wrong] = split_stages(other)[wrong]
    written = ProgramStages(stages)

    def compiled(traced: Program, target: Target, **options: Any) -> Any:
        """That of the wrong stage shows the kernels of what was written."""
        side = ENCODER if any(spec.name == "attention_mask" for spec in traced.inputs) else DECODER
        shown = compare.trace(stages[side])
        return lambda **batch: run(shown, batch)

    monkeypatch.setattr(compare, "load_library", lambda folder: written)
    monkeypatch.setattr(compare, "compile_program", compiled)
    monkeypatch.setattr(compare, "compared_calls", lambda code: {})
    options = {"target": Target.LLVM}
    if wrong:
        with pytest.raises(CheckError, match=rf"fused_linear in model\.{wrong}\.layers\.\d\.fc2"):
            compare.verify_export(program, tmp_path, data, **options)
        return
    verification = compare.verify_export(program, tmp_path, data, **options)
    counted = Counter(kernels.kind(node) for node in program.graph.nodes if kernels.is_kernel(node))
    del counted["fused_embedding"]  # an expression, seen in what follows
    assert {row.kind: row.kernels for row in verification.kernels if row.kind in counted} == counted
    assert verification.exposing == 0
    assert verification.batches == 6


def test_a_library_that_is_not_run_expects_what_the_program_gives(seq2seq: Any) -> None:
    program, data = seq2seq.traced("whisper"), seq2seq.batches("whisper", 1)
    recorded = compare.expect(program, data, Code(SimpleNamespace(as_text=str), Target.CUDA))
    assert set(recorded.selftest.outputs) == {spec.name for spec in program.outputs}
    assert set(recorded.selftest.inputs) == {spec.name for spec in program.inputs} - {"decoder_attention_mask"}
    assert recorded.unseen.sizes.startswith("batch 3, ")


def test_what_cannot_be_cut_in_two_is_refused_before_work(seq2seq: Any) -> None:
    TvmKernels().check_program(seq2seq.traced("bart"))
    with pytest.raises(BitlowerError, match="cannot be cut into an encoder and a decoder"):
        TvmKernels().check_program(seq2seq.reading_source())
