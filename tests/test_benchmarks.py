"""Benchmarks start: each parses its command line, and what it names is there."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_"))


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.stem)
def test_a_benchmark_starts(
    benchmark: Path, path: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(benchmark), "--help"])
    if benchmark.stem == "mutation":
        pytest.importorskip("cosmic_ray")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(benchmark), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


def test_what_is_mutated_and_its_tests_are_there() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "mutation.py").read_text())
    [table] = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "TARGETS"]
    for source, tests in ast.literal_eval(table).items():
        assert (ROOT / source).is_file(), source
        for name in tests.split():
            assert (ROOT / "tests" / f"{name}.py").is_file(), name


def test_the_kernels_of_cards_can_be_specified(path: None) -> None:
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    cases = runpy.run_path(str(ROOT / "benchmarks" / "kernel_cards.py"))["cases"]()
    assert len({name for name, _, _ in cases}) == len(cases)


def test_kernels_of_the_host_are_built_and_run(path: None) -> None:
    """As the benchmark of rates does, on the arguments that it makes."""
    pytest.importorskip("tvm", reason="the extra tvm is not installed")
    rates = runpy.run_path(str(ROOT / "benchmarks" / "host_rates.py"))
    for bits, integer in ((4, True), (8, False)):
        rates["kernel"](bits, integer, 2)()
