"""Whole runs with a backend that only writes the program down: order, files, resume, determinism, clean failure."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitlower.backends.registry import verify_artifact
from bitlower.frontends import load
from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program
from bitlower.passes import PassManager, format_pipeline
from bitlower.tools.recipes.recipe import Recipe, load_recipe
from bitlower.tools.render import Display
from bitlower.tools.runs.flow import RunOptions, quantize, recipe_job, run_recipe, standard_passes, standard_recipe


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder) if (folder / name).is_file()}


def recipe_of(bert: Path, texts: Path) -> Recipe:
    return standard_recipe(str(bert), "W8A8", str(texts))


def test_a_run_writes_everything_and_tells_what_it_took(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    output = tmp_path / "out"
    summary = run_recipe(recipe_of(bert, texts), output)
    assert listing(output) == [
        "ledger.json", "manifest.json", "model.txt", "recipe.yaml", "reports", "reports/clean.json",
        "reports/quantize.json", "reports/tensors.json", "verdict.json",
    ]  # fmt: skip
    names = [pass_.name for pass_ in standard_passes("W8A8")]
    assert [stage.name for stage in summary.stages] == ["load", "data", *names, "onnx-qdq"]
    assert summary.output == output
    assert [row["pass"] for row in summary.ledger["rows"]] == ["quantize", "calibrate"]
    assert summary.ledger["rows"][1]["outputs"]["last_hidden_state"]["cosine"] > 0.99
    assert summary.float_bytes > 40_000 < summary.peak_bytes
    assert summary.artifact_bytes == sum(map(len, contents(output).values()))
    assert summary.reports == {"onnx-qdq": {"kernels": {"got": 3, "expected": 3}, "worst": 0.5}}
    ((program, _, batches),) = backend.calls
    assert program.level is Level.INTEGER
    assert sum(len(batch["input_ids"]) for batch in batches) == 5  # an eighth of 40 texts is held out
    assert summary.to_dict()["pipeline"] == format_pipeline(standard_passes("W8A8"))


def test_what_the_frontend_notes_is_shown_and_said_in_the_summary(
    bert_program: Program, bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, capsys, monkeypatch
) -> None:
    noted = replace(bert_program, notes=("the weights were widened",))
    monkeypatch.setattr("bitlower.tools.runs.flow.load", lambda *arguments, **options: noted.clone())
    summary = run_recipe(recipe_of(bert, texts), tmp_path / "out", RunOptions(cache=None, display=Display()))
    assert summary.to_dict()["notes"] == ["the weights were widened"]
    assert "the weights were widened" in capsys.readouterr().err.splitlines()


def test_the_recipe_in_the_artifact_runs_again_and_names_no_place(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    run_recipe(recipe_of(bert, texts), tmp_path / "out")
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert str(tmp_path) not in text
    assert str(bert.parent) not in text
    again = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert again.model.path == bert.name
    assert (again.calibration.data, again.calibration.samples) == (texts.name, 35)


def test_runs_are_byte_identical_with_and_without_the_cache(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    recipe = recipe_of(bert, texts)
    for name, options in {"a": RunOptions(cache=None), "b": RunOptions(), "c": RunOptions()}.items():
        run_recipe(recipe, tmp_path / name, options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_python_in_one_line_gives_what_the_recipe_gives(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    run_recipe(recipe_of(bert, texts), tmp_path / "a")
    made = quantize(bert, scheme="W8A8", calibration=texts, output=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert made.output == tmp_path / "b"
    assert made.program.level is Level.INTEGER


def test_python_takes_modules_texts_and_batches(bert: Path, texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    lines = texts.read_text().splitlines()
    from_texts = quantize(bert, calibration=lines)
    assert from_texts.output is None
    assert from_texts.program.level is Level.INTEGER
    module = AutoModel.from_pretrained(bert)
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    inputs |= {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    assert quantize(module, calibration=[inputs] * 8).program.level is Level.INTEGER
    with pytest.raises(BitlowerError, match="calibration data"):
        quantize(bert)
    with pytest.raises(BitlowerError, match="empty"):
        quantize(bert, calibration=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"export": [{"onnx-qdc": {}}]}, "unknown backend 'onnx-qdc'; did you mean 'onnx-qdq'"),
        ({"export": [{"onnx-qdq": {"opsett": 21}}]}, "has no option 'opsett'; did you mean 'opset'"),
        ({"export": ["onnx-qdq", "onnx-qdq"]}, "named twice"),
        ({"passes": ["calibrate"]}, "calibrate"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, change: dict[str, Any], message: str
) -> None:
    form = recipe_of(bert, texts).model_dump(exclude_unset=True) | change
    with pytest.raises(BitlowerError) as caught:
        recipe_job(Recipe.model_validate(form)).check()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["onnx-qdq", "checkpoint"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["lower-integer", "fuse"],
            "a fused program has kernels that this backend does not know; leave out the pass `fuse`",
        ),
        ([], "a simulated program has no integers to export; run the pass `lower-integer` first"),
    ],
)
def test_levels_that_a_backend_does_not_take_are_found_too(
    bert: Path, texts: Path, name: str, more: list[str], message: str
) -> None:
    change = {"passes": ["clean", "quantize", "calibrate", *more], "export": [name]}
    form = recipe_of(bert, texts).model_dump(exclude_unset=True) | change
    with pytest.raises(BitlowerError) as caught:
        recipe_job(Recipe.model_validate(form)).check()
    assert str(caught.value) == f"backend '{name}': {message}"


def test_several_exports_get_folders_of_their_own(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    recipe = recipe_of(bert, texts)
    form = recipe.model_dump(exclude_unset=True) | {"export": [{"onnx-qdq": {"opset": 23}}, "other"]}
    run_recipe(Recipe.model_validate(form), tmp_path / "out")
    files = {"ledger.json", "manifest.json", "model.txt", "recipe.yaml", "reports/clean.json", "reports/quantize.json"}
    files |= {"verdict.json", "reports/tensors.json"}
    assert set(contents(tmp_path / "out")) == {f"{name}/{file}" for name in ("onnx-qdq", "other") for file in files}
    assert [call[1] for call in backend.calls] == [23, 21]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckError("wrong"), KeyError("x")]
)
def test_a_failing_export_leaves_nothing(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, error: Exception
) -> None:
    def export(
        self: object, program: Program, folder: Path, batches: Sequence[Batch], provenance: object = None
    ) -> None:
        (folder / "half").write_text("")
        raise error

    backend.replace(export=export)
    before = listing(tmp_path)
    with pytest.raises(BitlowerError if isinstance(error, OSError) else type(error)) as caught:
        run_recipe(recipe_of(bert, texts), tmp_path / "out")
    assert listing(tmp_path) == before
    if isinstance(error, OSError):
        assert "the disk is full" in str(caught.value)


def test_a_second_run_takes_finished_passes_from_the_cache(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitlower.passes.quantizers.calibrate import Calibrate

    run_recipe(recipe_of(bert, texts), tmp_path / "a")
    monkeypatch.setattr(Calibrate, "run", lambda *_: pytest.fail("calibrated again"))
    run_recipe(recipe_of(bert, texts), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_faults_leave_a_reproducer_and_bad_input_does_not(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = recipe_of(bert, texts).model_dump(exclude_unset=True)
    form["passes"][1] = {"quantize": {"ignore": ["no-such-layer"]}}
    with pytest.raises(BitlowerError, match="no-such-layer"):
        run_recipe(Recipe.model_validate(form), tmp_path / "out")
    assert not (own_cache / "reproducer").exists()
    from bitlower.passes.quantizers.calibrate import Calibrate

    monkeypatch.setattr(Calibrate, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe(recipe_of(bert, texts), tmp_path / "out")
    assert (own_cache / "reproducer" / "pipeline.txt").read_text() == "calibrate\n"


KILLED = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from bitlower.backends.base import Backend
from bitlower.backends.registry import BACKENDS
from bitlower.tools.runs.flow import run_recipe, standard_recipe
from bitlower.passes.quantizers.calibrate import Calibrate
bert, texts, output, where = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
class Report(dict):
    to_dict = dict.copy
@dataclass(frozen=True)
class Stub(Backend):
    name: ClassVar[str] = "onnx-qdq"
    def export(self, program, folder, batches, provenance=None):
        (folder / "model.txt").write_text(program.digest())
        (folder / "manifest.json").write_text("{}")
        die() if where == "export" else None
        return Report()
    verify = sizes = die
BACKENDS.folder, BACKENDS.loose = Path(os.devnull), {"onnx-qdq": (Path("stub.py"), Stub)}
if where == "calibrate":
    Calibrate.run = die
run_recipe(standard_recipe(bert, "W8A8", texts), Path(output))
"""


def test_killed_and_started_again_gives_the_same_bytes(
    bert: Path, texts: Path, tmp_path: Path, own_cache: Path, backend: SimpleNamespace, run_script: Callable[..., Any]
) -> None:
    def run(where: str) -> int:
        caches = {"XDG_CACHE_HOME": str(own_cache / "killed")}
        return run_script(KILLED, bert, texts, tmp_path / "killed", where, env=caches).returncode

    run_recipe(recipe_of(bert, texts), tmp_path / "undisturbed")
    for where in ("calibrate", "export"):
        assert run(where) == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    assert run("nowhere") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


KILLED_IN_GPTQ = """
import os, signal, sys
from bitlower.passes._machinery import checkpoints
from bitlower.passes.rounding import gptq
from bitlower.tools.runs.flow import quantize
model, text, output, left = *sys.argv[1:4], int(sys.argv[4])
solved, save = [], checkpoints.save_checkpoint
def save_or_die(folder, name, stored):
    save(folder, name, stored)
    solved.append(name)
    if len(solved) == left:
        os.kill(os.getpid(), signal.SIGKILL)
gptq.save_checkpoint = save_or_die
quantize(model, scheme="W4A16-g16", calibration=text, output=output, samples=4, max_length=32, cache=sys.argv[5])
print(len(solved))
"""


def test_gptq_goes_on_after_the_layers_that_were_done(
    llama: Path, story: Path, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    def run(output: str, cache: str, left: int) -> Any:
        return run_script(KILLED_IN_GPTQ, llama, story, tmp_path / output, left, tmp_path / cache)

    undisturbed = run("undisturbed", "cache", 0)
    groups = int(undisturbed.stdout)
    assert run("killed", "other", 3).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert int(run("killed", "other", 0).stdout) == groups - 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_the_program_is_verified_between_passes_unless_told_otherwise(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    init = PassManager.__init__

    def spy(self: PassManager, *args: Any, verify: bool = True) -> None:
        seen.append(verify)
        init(self, *args, verify=verify)

    monkeypatch.setattr(PassManager, "__init__", spy)
    run_recipe(recipe_of(bert, texts), tmp_path / "a")
    run_recipe(recipe_of(bert, texts), tmp_path / "b", RunOptions(verify=False))
    assert seen == [True, False]


def test_a_decoder_is_calibrated_on_windows_of_the_whole_text(
    llama: Path, story: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    recipe = standard_recipe(str(llama), "W4A16-g16", str(story), algorithm="rtn", samples=6, max_length=24)
    data = recipe_job(recipe).data
    made = data(load(str(llama)))
    assert [tuple(batch["input_ids"].shape) for batch in made.calibration] == [(1, 24)] * 6
    assert [tuple(batch["input_ids"].shape) for batch in made.evaluation] == [(1, 24)] * 2
    assert all(bool(batch["attention_mask"].all()) for batch in made.calibration)
    assert all(batch["position_ids"][0].tolist() == list(range(24)) for batch in made.calibration)
    summary = run_recipe(recipe, tmp_path / "out")
    assert summary.to_dict()["pipeline"].split(",")[2] == "rtn"
    again = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (again.calibration.samples, again.calibration.max_length) == (6, 24)
    short = standard_recipe(str(llama), "W4A16-g16", str(story), samples=400)
    with pytest.raises(BitlowerError, match="calibration text is too short"):
        run_recipe(short, tmp_path / "other")


def test_held_out_windows_may_come_from_another_text(llama: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("snow " * 200)
    form = standard_recipe(str(llama), "W4A16-g16", str(story), samples=2, max_length=8).model_dump(exclude_unset=True)
    form["evaluation"] = {"data": str(tmp_path / "other.txt"), "max_length": 16, "samples": 3}
    made = recipe_job(Recipe.model_validate(form)).data(load(str(llama)))
    assert [tuple(batch["input_ids"].shape) for batch in made.evaluation] == [(1, 16)] * 3
    assert {len(batch["input_ids"].unique()) for batch in made.evaluation} <= {1, 2}


def test_gptq_in_one_line(llama: Path, story: Path, tmp_path: Path, backend: SimpleNamespace) -> None:
    made = quantize(llama, scheme="W4A16-g16", calibration=story, output=tmp_path / "out", samples=4, max_length=32)
    assert [text.partition("{")[0] for text in made.program.passes] == ["clean", "quantize", "gptq", "lower-integer"]
    assert made.program.level is Level.INTEGER
    codes = {quantizer.tensor for _, quantizer in made.program.quantizers()}
    assert not codes & {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(codes) == 14


def test_adaround_of_a_decoder(llama: Path, story: Path, tmp_path: Path) -> None:
    """What the one-line command runs, with fewer steps, up to the artifact and its checks."""
    recipe = standard_recipe(str(llama), "W4A8-e16", str(story), samples=4, max_length=32, algorithm="adaround")
    form = recipe.model_dump(exclude_unset=True)
    place = next(i for i, step in enumerate(form["passes"]) if step == "adaround")
    form["passes"][place] = {"adaround": {"iterations": 10}}
    summary = run_recipe(Recipe.model_validate(form), tmp_path / "out", RunOptions(cache=None))
    assert "adaround" in summary.pipeline
    assert verify_artifact(tmp_path / "out")


def test_without_data_weights_are_rounded(llama: Path) -> None:
    made = quantize(llama, scheme="W4A16-g16")
    assert [text.partition("{")[0] for text in made.program.passes] == ["clean", "quantize", "rtn", "lower-integer"]


def test_artifacts_need_no_data_where_no_pass_does(llama: Path, story: Path, tmp_path: Path) -> None:
    recipe = standard_recipe(str(llama), "W4A16-g16", None)
    assert recipe.calibration is None
    run_recipe(recipe, tmp_path / "a", RunOptions(cache=None))
    again = load_recipe(tmp_path / "a" / "recipe.yaml")
    assert again.calibration is None
    assert [step.name for step in again.passes] == ["clean", "quantize", "rtn", "lower-integer"]
    assert verify_artifact(tmp_path / "a")
    form = recipe.model_dump(exclude_unset=True) | {"evaluation": {"data": str(story), "max_length": 16, "samples": 3}}
    data = recipe_job(Recipe.model_validate(form)).data(load(str(llama)))
    assert (len(data.calibration), [tuple(b["input_ids"].shape) for b in data.evaluation]) == (0, [(1, 16)] * 3)


def test_per_token_activations_need_no_data(bert: Path, tmp_path: Path) -> None:
    made = quantize(bert, scheme="W8A8-token", output=tmp_path / "out")
    assert [text.partition("{")[0] for text in made.program.passes] == [
        "clean", "quantize", "calibrate", "lower-integer",
    ]  # fmt: skip
    assert verify_artifact(tmp_path / "out")


def test_a_target_refuses_before_the_long_passes(
    llama: Path, story: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitlower.passes.rounding.rtn import Rtn

    backend.replace(supports=lambda _, spec, shape, role: f"no {spec.grid.bits} bits" if shape == (32, 64) else "")
    monkeypatch.setattr(Rtn, "run", lambda *_: pytest.fail("the weights were rounded"))
    with pytest.raises(BitlowerError, match=r"onnx-qdq cannot hold model.layers.0.mlp.down_proj.weight .*no 4 bits"):
        quantize(llama, scheme="W4A16-g16", algorithm="rtn", calibration=story, output=tmp_path / "out", samples=4,
                 max_length=32)  # fmt: skip
    assert not (tmp_path / "out").exists()
