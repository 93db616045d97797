"""A backend that another distribution offers: planned, exported, verified, loaded and evaluated like our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.ir import BitlowerError
from bitlower.tools.runs.flow import quantize
from bitlower.tools.runs.standard import standard_exports

PLUGINS = Path(__file__).parents[2] / "plugin_package"
ENTRY = "[bitlower.backends]\nstored-program = stored_program:StoredProgram\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with the module and the metadata of its distribution."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "stored_program.py").write_text((PLUGINS / "stored_program.py").read_text())
    metadata = folder / "bitlower_stored_program-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bitlower-stored-program\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def command(site: Path, tmp_path: Path, run_script: Callable[..., Any]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line where the distribution is installed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        script = "from bitlower.tools.cli import command; command()"
        done = run_script(script, *arguments, env={"PYTHONPATH": str(site)}, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def test_it_is_planned_exported_verified_and_loaded(
    bert: Path, texts: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]], installed: None
) -> None:
    out = tmp_path / "out"
    code, said, error = command(
        "--json", "quantize", bert, "--calibration", texts, "--format", "stored-program", "-o", out
    )
    assert code == 0, error
    assert json.loads(said)["reports"] == {"stored-program": {"batches": 1, "difference": 0.0}}

    code, said, error = command("--json", "plan", bert, "--scheme", "W8A8", "--format", "stored-program")
    assert code == 0, error
    plan = json.loads(said)
    assert plan["target"] == "stored-program"
    written = sum(path.stat().st_size for path in (out / "program").iterdir())
    assert plan["file_bytes"] == pytest.approx(written, rel=0.5)

    code, said, error = command("--json", "verify", out)
    assert code == 0, error
    assert json.loads(said)["batches"] == 0
    (out / "program" / "program.json").write_text("{}")
    assert command("verify", out)[0] == 1


def test_it_is_loaded_and_run(bert: Path, texts: Path, tmp_path: Path, installed: None) -> None:
    import bitlower
    from bitlower.tools.evaluation.runners import open_runner

    made = quantize(str(bert), calibration=str(texts), formats=["stored-once"], output=tmp_path / "out")
    assert made.summary.reports == {"stored-program": {"batches": 1, "difference": 0.0}}
    ids = torch.tensor([[2, 8, 9, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    expected = made.program(**batch)["last_hidden_state"]
    model = bitlower.load(tmp_path / "out")
    assert type(model).__name__ == "StoredModel"
    assert torch.equal(model(**batch)["last_hidden_state"], expected)
    assert torch.equal(torch.from_numpy(open_runner(tmp_path / "out").run(batch)["last_hidden_state"]), expected)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ("{stored-program: {batches: 0}}", "recipe.yaml:4: backend 'stored-program': option 'batches' takes int of 1"),
        ("{stored-program: {batchs: 1}}", "recipe.yaml:4: .*has no option 'batchs'; did you mean 'batches'"),
        ("stored-programm", "recipe.yaml:4: unknown backend 'stored-programm'; did you mean 'stored-program'"),
    ],
)
def test_its_options_are_checked_when_a_recipe_is_read(
    export: str, message: str, bert: Path, tmp_path: Path, installed: None
) -> None:
    from bitlower.tools.recipes.recipe import load_recipe

    (tmp_path / "recipe.yaml").write_text(f"model: {{path: {bert}}}\npasses: [clean]\nexport:\n  - {export}\n")
    with pytest.raises(BitlowerError, match=message):
        load_recipe(tmp_path / "recipe.yaml").build_exports()


def test_what_it_raises_names_it(
    bert: Path, texts: Path, tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stored_program

    monkeypatch.setattr(stored_program.StoredProgram, "export", lambda *_: 1 / 0)
    with pytest.raises(BitlowerError, match="backend 'stored-program' failed: ZeroDivisionError"):
        quantize(str(bert), calibration=str(texts), formats=["stored-program"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_that_cannot_be_imported_stands_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "site" / "broken-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[bitlower.backends]\nbroken = no_such_module:Broken\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert standard_exports("W8A8", ["onnx-qdq"])[0].name == "onnx-qdq"
    assert standard_exports("W4A16-g32", ["gptq-v2"])[0].name == "checkpoint"
    with pytest.raises(BitlowerError, match=r"broken 1\.0 .*fails to import: ModuleNotFoundError"):
        standard_exports("W8A8", ["broken"])
