"""Harnesses on the command line, and what is said where they are not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bitlower.ir import BitlowerError
from bitlower.tools.cli import main
from bitlower.tools.harness.tasks import Request, run_harness


@pytest.mark.parametrize(("harness", "module"), [("lm-eval", "lm_eval.evaluator"), ("mteb", "mteb")])
def test_a_harness_that_is_not_installed_is_named(harness: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BitlowerError) as caught:
        run_harness(harness, "model", Request(("x",)))
    assert f"--harness {harness} needs the package {harness}" in str(caught.value)
    assert f"pip install 'bitlower[{harness}]'" in str(caught.value)


def test_tasks_on_the_command_line(
    llama: Path, tmp_path: Path, traced: None, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"text": f"the cat {word}", "label": place % 2}
        for place, word in enumerate(["runs", "sings", "falls", "sleeps"] * 6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": ["rain", "a small bird"], "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))
    arguments = [
        "eval",
        str(llama),
        "--harness",
        "lm-eval",
        "--tasks",
        "tiny",
        "--include-path",
        str(tmp_path / "tasks"),
    ]
    assert main([*arguments, "--limit", "20", "--compare", str(llama), "--json"]) == 0
    form = json.loads(capfd.readouterr().out)
    tiny = form["tasks"]["tiny"]
    assert (form["harness"], tiny["samples"], tiny["differences"]["acc"]["verdict"]) == ("lm-eval", 20, "equal")
    low, high = tiny["intervals"]["acc"]
    assert low <= tiny["acc"] <= high
    assert main(["eval", str(llama), "--json"]) == 2
    assert "give --task, or --harness with --tasks" in capfd.readouterr().out
