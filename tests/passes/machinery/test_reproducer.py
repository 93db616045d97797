from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitlower.ir import BitlowerError, Program, serialize
from bitlower.passes import Context, PassManager, Reproducer, load_plugin, make_pass, replay
from bitlower.passes._machinery import registry

PLUGIN = """
from dataclasses import dataclass
import torch
from bitlower.passes import Contract, Pass

@dataclass(frozen=True)
class Threshold:
    value: float

@dataclass(frozen=True)
class Learn(Pass):
    name = "learn"
    contract = Contract.ANALYSIS

    def run(self, program, context):
        context.put(Threshold(float(context.calibration[0]["x"].max())))
        return False

@dataclass(frozen=True)
class Judge(Pass):
    name = "judge"
    strict: bool = False

    def run(self, program, context):
        largest = float(context.evaluation[1]["x"].max())
        draw = float(torch.rand((), generator=context.generator("judge")))
        if self.strict:
            raise RuntimeError(f"{context[Threshold].value} {largest} {draw}")
        return False
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    load_plugin(path)
    return path


@pytest.fixture
def context() -> Context:
    generator = torch.Generator().manual_seed(3)
    data = [{"x": torch.randn(n, 16, generator=generator)} for n in (5, 3, 2)]
    return Context(calibration=data[:1], evaluation=data[1:], seed=11)


def fail(program: Program, context: Context, folder: Path) -> str:
    passes = [make_pass("learn"), make_pass("judge"), make_pass("judge", {"strict": True})]
    with pytest.raises(BitlowerError) as info:
        PassManager(passes, [Reproducer(folder)]).run(program, context)
    assert f"reproducer: {folder} (command.txt replays it)" in info.value.__notes__
    return str(info.value)


def test_the_folder_replays_the_failure(
    tiny_program: Program, context: Context, tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "reproducer"
    message = fail(tiny_program, context, folder)
    assert (folder / "pipeline.txt").read_text() == "judge{strict=true}\n"
    assert serialize.load(folder).digest() == tiny_program.digest()
    monkeypatch.setattr(registry.PASSES, "loose", {})
    plugin.unlink()  # the folder is whole without it
    with pytest.raises(BitlowerError) as info:
        replay(folder)
    assert str(info.value) == message
    assert not [p for p in folder.parent.iterdir() if p.name != "reproducer"]


def test_the_command_runs_in_the_folder(tiny_program: Program, context: Context, tmp_path: Path, plugin: Path) -> None:
    message = fail(tiny_program, context, tmp_path / "r")
    command = (tmp_path / "r" / "command.txt").read_text()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path / "r", capture_output=True, text=True, env={**environment, "PATH": path}
    )
    assert done.returncode == 1
    assert message in done.stderr


def test_a_pass_that_works_now_gives_its_program(
    tiny_program: Program, context: Context, tmp_path: Path, plugin: Path
) -> None:
    fail(tiny_program, context, tmp_path / "r")
    (tmp_path / "r" / "pipeline.txt").write_text("judge")
    assert replay(tmp_path / "r").digest() == tiny_program.digest()


def test_a_newer_failure_replaces_an_older_one(
    tiny_program: Program, context: Context, tmp_path: Path, plugin: Path
) -> None:
    fail(tiny_program, context, tmp_path / "r")
    (tmp_path / "r" / "left over").write_text("")
    fail(tiny_program, context, tmp_path / "r")
    assert not (tmp_path / "r" / "left over").exists()


def test_nothing_is_written_when_all_goes_well_or_a_user_stops_it(
    tiny_program: Program, context: Context, tmp_path: Path, plugin: Path
) -> None:
    PassManager([make_pass("judge")], [Reproducer(tmp_path / "r")]).run(tiny_program, context)
    Reproducer(tmp_path / "r").failed(make_pass("judge"), tiny_program, context, KeyboardInterrupt())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("missing", ["settings.json", "pipeline.txt", "batches.safetensors", "program.json"])
def test_a_folder_that_is_no_reproducer_is_refused(
    tiny_program: Program, context: Context, tmp_path: Path, plugin: Path, missing: str
) -> None:
    fail(tiny_program, context, tmp_path / "r")
    (tmp_path / "r" / missing).unlink()
    with pytest.raises(BitlowerError, match=f"{tmp_path / 'r'}.*{missing}"):
        replay(tmp_path / "r")
