"""The adapter for lm-evaluation-harness: against the harness's own class for transformers on the same float model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import BitlowerError, Program
from bitlower.tools.evaluation.compare import compare
from bitlower.tools.evaluation.language_model import language_model
from bitlower.tools.harness.tasks import Request, run_harness

pytest.importorskip("lm_eval")

PAIRS = [
    ("the cat", " sings near the river"),
    ("the cat", " runs"),
    ("the cat", " sleeps"),
    ("", "old dog never runs"),
    ("a bird ", "goes"),
    ("rain wind snow " * 30, "and the small house stays"),  # longer than the model takes
]
SETTINGS: dict[str, Any] = {"until": ["river"], "max_gen_toks": 6, "do_sample": False}


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def theirs(llama: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=2, max_length=64)


@pytest.fixture(scope="module")
def ours(llama_program: Program) -> Any:
    from bitlower.tools.harness.language_models import HarnessModel

    return HarnessModel(language_model(llama_program), batch_size=2, track=lambda items, label: iter(items))


def test_log_likelihoods_are_those_of_the_harness(ours: Any, theirs: Any) -> None:
    got, wanted = (model.loglikelihood(asked(*PAIRS)) for model in (ours, theirs))
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert len({round(value, 3) for value, _ in got}) == len(PAIRS)


def test_texts_as_a_whole_go_through_the_same_windows(ours: Any, theirs: Any) -> None:
    texts = asked(("the cat sings",), ("old house near a river and " * 25,))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)


def test_what_is_written_is_the_same(ours: Any, theirs: Any) -> None:
    prompts = ("the cat", "rain falls and", "a small bird")
    endless = [(prompt, SETTINGS | {"until": []}) for prompt in prompts]
    texts = ours.generate_until(asked(*endless))
    assert texts == theirs.generate_until(asked(*endless))
    stop = texts[0].split()[2]
    ended = asked((prompts[0], SETTINGS | {"until": [stop]}))
    assert ours.generate_until(ended) == theirs.generate_until(ended) == [texts[0].partition(stop)[0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks of three kinds over 30 rows."""
    rows = [
        {"text": f"the {a} {b}", "choices": ["near the river", "rain"], "label": place % 2}
        for place, (a, b) in enumerate(
            (a, b) for a in ("cat", "dog", "bird", "old", "red") for b in ["a", "and", "under", "over", "the", "never"]
        )
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
    }
    choice = {
        "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    whole = {
        "task": "tiny_whole", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    for task in (choice, whole):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return tmp_path / "tasks"


def test_tasks_of_a_folder_on_an_artifact_and_its_float_model(
    folder: Path, llama: Path, llama_program: Program, tmp_path: Path, theirs: Any, traced: None
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    output = tmp_path / "artifact"
    output.mkdir()
    OnnxQdq().export(llama_program, output, random_windows(llama_program))
    request = Request(("tiny_choice", "tiny_whole"), include=folder)
    of_artifact, of_float = (run_harness("lm-eval", target, request) for target in (output, llama))
    reference = simple_evaluate(
        theirs,
        tasks=["tiny_choice", "tiny_whole"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]
    for results in (of_artifact, of_float):
        for task, result in results.items():
            assert result.evaluation.samples == 30
            for name, value in result.evaluation.metrics.items():
                assert value == pytest.approx(reference[task][f"{name},none"], rel=1e-3), name
    choice, whole = of_float["tiny_choice"].evaluation, of_float["tiny_whole"]
    low, high = choice.intervals["acc"]
    error = reference["tiny_choice"]["acc_stderr,none"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert whole.lower == {"word_perplexity", "bits_per_byte"}
    [low, high], value = whole.evaluation.intervals["bits_per_byte"], whole.evaluation.metrics["bits_per_byte"]
    assert low < value < high
    pairs = compare(of_artifact["tiny_choice"].evaluation, choice)
    assert pairs["acc"].difference == pytest.approx(0, abs=0.05)
    assert not pairs["acc"].above_noise


def test_what_is_wrong_is_named(llama: Path, bert: Path, folder: Path, traced: None) -> None:
    for request, message in (
        (Request(()), "no task of lm-eval to run"),
        (Request(("tiny_choise",), include=folder), "no task 'tiny_choise'; did you mean 'tiny_choice'"),
        (Request(("tiny_choice",), include=folder / "gone"), "there is no folder"),
    ):
        with pytest.raises(BitlowerError) as caught:
            run_harness("lm-eval", llama, request)
        assert message in str(caught.value)
    with pytest.raises(BitlowerError, match="unknown harness 'lmeval'; did you mean 'lm-eval'"):
        run_harness("lmeval", llama, Request(("x",)))
    with pytest.raises(BitlowerError, match="no causal language model"):
        run_harness("lm-eval", bert, Request(("tiny_choice",), include=folder))
    (folder.parent / "rows.jsonl").unlink()
    with pytest.raises(BitlowerError, match=r"cannot run tiny_choice.*are the task's data on this machine"):
        run_harness("lm-eval", llama, Request(("tiny_choice",), include=folder))
