"""Traces in the cache: which commands keep them, and which take them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bitlower.frontends import _encoder
from bitlower.frontends import trace_cache as _trace_cache
from bitlower.ir import Program
from bitlower.tools.planning.costs import TRACE_SECONDS, Load
from bitlower.tools.planning.plan import KEPT, Plan, make_plan, plan_model, plan_recipe
from bitlower.tools.runs.flow import RunOptions, run_recipe, standard_recipe
from bitlower.tools.runs.standard import standard_passes


@pytest.fixture(autouse=True)
def no_shared_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITLOWER_TRACES")


def cached_passes(plan: Plan) -> list[str]:
    """The names of the passes whose results the plan says are in the cache."""
    start = "results of passes that are in the cache: "
    return next((note.removeprefix(start).split(", ") for note in plan.notes if note.startswith(start)), [])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_keeps_its_trace_in_the_cache_unless_there_is_none(
    own_bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "home" / "bitlower"
    recipe = standard_recipe(str(own_bert), "W8A8", str(texts))
    run_recipe(recipe, tmp_path / "a", RunOptions(cache=cache))
    assert len(list((cache / "traces").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    run_recipe(recipe, tmp_path / "b", RunOptions(cache=None))
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(_encoder, "export", None)
    run_recipe(recipe, tmp_path / "c", RunOptions(cache=cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert KEPT in plan_model(str(own_bert), "W8A8").notes
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_plan_names_the_passes_that_a_run_takes_from_the_cache(
    own_bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the recipe that ran, those before the first that differs of another, none with other data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = standard_recipe(str(own_bert), "W8A8", str(texts))
    before = plan_recipe(recipe)
    run_recipe(recipe, tmp_path / "out", RunOptions())
    names = [pass_.name for pass_ in standard_passes("W8A8")]
    assert not cached_passes(before)
    after = plan_recipe(recipe)
    assert cached_passes(after) == names
    other = standard_recipe(str(own_bert), "W4A8", str(texts))
    assert cached_passes(plan_recipe(other)) == names[: names.index("quantize")]
    few = standard_recipe(str(own_bert), "W8A8", str(texts), samples=3)
    assert "calibrate" not in cached_passes(plan_recipe(few))


def test_a_trace_in_the_cache_saves_the_time_of_tracing(bert_program: Program) -> None:
    made, kept = (
        make_plan(bert_program.clone(), standard_passes("W8A8"), Load(8, 16), trace_cached=kept)
        for kept in (False, True)
    )
    assert made.seconds - kept.seconds == pytest.approx(TRACE_SECONDS, abs=1.0)  # the machine is timed twice
    assert KEPT not in made.notes


def test_cached_passes_take_neither_time_nor_memory(bert_program: Program) -> None:
    """Of a run over so much data that all else is little; the machine is timed for each plan."""
    passes, data = standard_passes("W8A8", algorithm="gptq"), Load(100_000, 128)
    computed, cached = (make_plan(bert_program.clone(), passes, data, cached=n) for n in (0, len(passes)))
    assert cached.seconds < computed.seconds / 4
    assert cached.peak_bytes < computed.peak_bytes
    assert cached.file_bytes == computed.file_bytes


def test_a_model_whose_trace_is_not_kept_is_not_said_to_have_one(
    own_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_trace_cache, "_write", lambda *arguments: None)
    assert KEPT not in plan_model(str(own_bert), "W8A8").notes
