"""Runs with training data: what passes are given, what the artifact says of it, and what is refused before."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program
from bitlower.passes import Context, find_pass
from bitlower.passes._machinery import registry
from bitlower.passes._machinery.digest import digest_batches
from bitlower.passes.training.qat import Qat
from bitlower.tools.recipes.recipe import TrainingSection, load_recipe
from bitlower.tools.runs.flow import RunOptions, quantize, recipe_job, run_recipe

_CASES = runpy.run_path(str(Path(__file__).parents[1] / "training_cases.py"))
rows, made, lines, table = (_CASES[name] for name in ("rows", "made", "lines", "table"))
LEARN = """
from dataclasses import dataclass
from bitlower import Context, Pass, Program

SEEN = []

@dataclass(frozen=True)
class Learn(Pass):
    name = "learn"
    steps: int = 0

    def trains(self) -> bool:
        return True

    def training_steps(self, batches: int) -> int:
        return self.steps or 3 * batches

    def run(self, program: Program, context: Context) -> bool:
        SEEN.append((context.training, context.held_out))
        return False
"""


@pytest.fixture
def learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin with a pass that trains."""
    monkeypatch.setattr(registry.PASSES, "loose", {})
    (tmp_path / "learn.py").write_text(LEARN)
    return tmp_path / "learn.py"


def recipe_text(model: Path, *sections: str) -> str:
    passes = "[clean, quantize, calibrate, learn, lower-integer]"
    head = f"model: {{path: {model}}}\nplugins: [learn.py]\npasses: {passes}\nexport: [onnx-qdq]\n"
    return head + "".join(f"{section}\n" for section in sections)


def test_a_run_hands_the_data_to_passes_and_says_so_in_the_artifact(
    classifier: Path, texts: Path, tmp_path: Path, learn: Path, table: Callable[..., Path], backend: SimpleNamespace
) -> None:
    path, held_out = table(rows(40)), table(rows(9, seed=3), "dev.tsv")
    text = recipe_text(
        classifier,
        f"calibration: {{data: {texts}, seed: 4}}",
        f"training: {{data: {path}, label: label, held_out: {held_out}, batch_size: 16}}",
    )
    (tmp_path / "recipe.yaml").write_text(text)
    said: dict[str, Any] = {}

    def export(self: object, program: Program, folder: Path, batches: Any, provenance: dict[str, Any]) -> Any:
        said.update(provenance)
        (folder / "manifest.json").write_text("{}")
        return backend.report()

    backend.replace(export=export)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    summary = run_recipe(recipe, tmp_path / "out", RunOptions(cache=None))
    ((training, others),) = sys.modules[find_pass("learn").__module__].SEEN
    expected = recipe_job(recipe).data(load(str(classifier)))
    assert said == {
        "seed": 4,
        "calibration_batches": len(expected.calibration),
        "calibration_sha256": digest_batches(expected.calibration),
        "training_batches": 3,
        "training_sha256": digest_batches(training),
        "held_out_batches": 1,
        "held_out_sha256": digest_batches(others),
    }
    assert digest_batches(expected.training) == said["training_sha256"]
    assert "to train on: 40 samples with labels in 3 batches; held out: 9 in 1" in summary.to_dict()["notes"]
    written = load_recipe(tmp_path / "out" / "recipe.yaml").training
    assert written == TrainingSection(data="train.tsv", label="label", held_out="dev.tsv", batch_size=16)


def test_a_pass_that_trains_needs_data(
    classifier: Path, texts: Path, tmp_path: Path, learn: Path, backend: SimpleNamespace
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(classifier))
    with pytest.raises(BitlowerError) as caught:
        recipe_job(load_recipe(path))
    expected = "pass 'learn' trains, and there are no data to train on; add a section `training`"
    assert str(caught.value) == f"{path}:3: {expected}"
    path.write_text(recipe_text(classifier, f"calibration: {{data: {texts}}}"))
    assert recipe_job(load_recipe(path)).data(load(str(classifier))).training == ()
    path.write_text(recipe_text(classifier, f"training: {{data: {texts}, seed: 3}}"))
    assert recipe_job(load_recipe(path)).seed == 3
    path.write_text(recipe_text(classifier, f"training: {{data: {texts}}}").replace("learn, ", ""))
    with pytest.raises(BitlowerError, match=r"recipe\.yaml:5: no pass trains on the training data; add a pass that"):
        recipe_job(load_recipe(path))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("label: label", ":6: labels are for models that read texts, and this is a language model"),
        ("column: [a, b]", ":6: pairs are for models that read texts, and this is a language model"),
        ("held_out: none.txt", ":6: the held-out data "),
        ("held_out: 1.5", ":6: training.held_out: write a share of the rows, more than 0 and less than 1, or a file"),
        ("held_out: true", ":6: training.held_out: write a share"),
        ("column: [a]", ":6: training.column: write a column, or a list of two for pairs of texts"),
        ("labl: x", ":6: unknown key 'labl' in training; did you mean 'label'?"),
    ],
)
def test_a_wrong_section_is_named_with_its_line(
    llama: Path, story: Path, tmp_path: Path, learn: Path, section: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(llama, f"training:\n  {section}\n  data: {story}"))
    with pytest.raises(BitlowerError) as caught:
        recipe_job(load_recipe(path))
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The contexts that ``qat`` was given, which trains nothing here."""
    found: list[Context] = []

    def run(self: Qat, program: Program, context: Context) -> bool:
        found.append(Context(training=context.training, held_out=context.held_out))
        return False

    monkeypatch.setattr(Qat, "run", run)
    return found


def test_one_line_trains_on_files_texts_and_batches(
    classifier: Path, texts: Path, tmp_path: Path, seen: list[Context], table: Callable[..., Path],
    backend: SimpleNamespace,
) -> None:  # fmt: skip
    path = table(rows(60))
    given = {"scheme": "W8A8", "calibration": texts, "max_length": 16}
    made = quantize(classifier, training=f"{path}:sentence", output=tmp_path / "out", **given)
    written = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert written.training == TrainingSection(data="train.tsv", column="sentence", max_length=16)
    assert [step.name for step in written.passes][-2:] == ["qat", "lower-integer"]
    assert made.output
    quantize(classifier, training=[text for text, *_ in rows(60)], **given)
    batches = [*seen[0].training, *seen[0].held_out]
    quantize(classifier, training=batches * 10, **given)
    file, listed, as_they_are = seen
    assert digest_batches(file.training) == digest_batches(listed.training)
    assert digest_batches(file.held_out) == digest_batches(listed.held_out)
    assert (len(lines(file.training)), len(lines(file.held_out))) == (54, 6)
    assert digest_batches(as_they_are.training) == digest_batches((batches * 10)[:27])
    assert digest_batches(as_they_are.held_out) == digest_batches((batches * 10)[27:])
    for few in ([], ["one"]):
        with pytest.raises(BitlowerError, match=f"the training data is too short: {len(few)} texts, 2 are needed"):
            quantize(classifier, training=few, **given)


def test_a_language_model_trains_on_windows_of_texts(
    llama: Path, llama_program: Program, story: Path, seen: list[Context]
) -> None:
    quantize(llama, scheme="W4A16-g16", training=story.read_text().splitlines(), max_length=16, bos="always")
    [context] = seen
    assert {tuple(batch["input_ids"].shape) for batch in context.training} == {(1, 16)}
    assert {int(batch["input_ids"][0, 0]) for batch in context.training} == {0}
    joined = story.with_name("joined.txt")
    joined.write_text("\n\n".join(story.read_text().splitlines()))
    expected = made(llama_program, {"data": str(joined), "max_length": 16}, decoder=True, bos="always")
    assert digest_batches(context.training) == digest_batches(expected.training)


def test_labels_that_are_not_finite_are_refused(classifier: Path, seen: list[Context]) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    good, bad = ({**batch, "labels": torch.tensor([0.5, value])} for value in (1.0, torch.nan))
    for training, part in (([good, bad, good], "training"), ([good, bad], "held-out")):
        with pytest.raises(BitlowerError, match=f"{part}: the tensor 'labels' of batch . holds NaN or Inf"):
            quantize(classifier, scheme="W8A8-token", training=training)
    assert not seen
