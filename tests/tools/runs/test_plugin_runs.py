"""Runs with plugins that misbehave: the exit code, one line, standard output for the result alone, nothing left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitlower.passes._machinery import registry
from bitlower.tools.cli import main

PLUGIN = """
import os, shutil, sys
from dataclasses import dataclass
from pathlib import Path
from bitlower.passes import Pass

{top}

@dataclass(frozen=True)
class Guest(Pass):
    name = "guest"
    size: int = 1

    def run(self, program):
        {body}
        return False
"""
CASES = {
    "exit": ("", "sys.exit(0)", 2, "pass 'guest' failed: SystemExit: 0 at guest.py:15"),
    "hard": ("", "raise GeneratorExit", 2, "pass 'guest' failed: GeneratorExit at guest.py:15"),
    "import": ("sys.exit(0)", "", 2, "recipe.yaml:3: the plugin guest.py fails to import: SystemExit: 0 at guest.py:7"),
    "folder": ("", "shutil.rmtree(Path(FOLDER))", 1, "the pass 'guest' removed the output's folder"),
    "writes": ("", "(Path(FOLDER) / 'x').touch()", 1, "the pass 'guest' wrote x into the output's folder"),
}


@pytest.fixture
def run(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Any:  # fmt: skip
    """``run(top, body)``: exit code, standard output and error of a run with such a plugin."""
    monkeypatch.setattr(registry.PASSES, "loose", {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {bert}}}\ncalibration: {{data: {texts}, samples: 4}}\nplugins: [guest.py]\n"
        "passes: [guest, clean]\nexport: [onnx-qdq]\n"
    )

    def go(top: str, body: str) -> tuple[int, str, str]:
        body = body.replace("FOLDER", repr(str(tmp_path / ".out.partial")))
        (tmp_path / "guest.py").write_text(PLUGIN.format(top=top, body=body))
        capfd.readouterr()
        code = main(["run", str(recipe), "-o", str(tmp_path / "out"), "--json"])
        return code, *capfd.readouterr()

    return go


@pytest.mark.parametrize("case", CASES)
def test_a_plugin_cannot_end_a_run_in_silence(run: Any, tmp_path: Path, case: str) -> None:
    top, body, expected, message = CASES[case]
    code, out, err = run(top, body)
    assert code == expected
    assert message in json.loads(out)["error"]
    assert json.loads(out)["exit_code"] == expected
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guest.py", "recipe.yaml", "sentences.txt"]


@pytest.mark.parametrize(
    "body",
    [
        "print('noise'); os.write(1, b'more')",
        "os.system('echo noise')",
        "sys.stdout.close(); print('noise', file=sys.__stdout__)",
        "os.close(1)",
        "os.dup2(0, 1); sys.stdout = None",
    ],
)
def test_standard_output_is_the_results_alone(run: Any, tmp_path: Path, body: str) -> None:
    code, out, err = run("print('imported')", body)
    assert code == 0, err
    assert json.loads(out)["pipeline"] == "guest,clean"
    assert "imported" in err
    assert ("noise" in err) == ("noise" in body)
    assert (tmp_path / "out" / "model.txt").is_file()
