from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec, serialize
from bitlower.passes import Context, PassManager, load_plugin, make_pass
from bitlower.passes._machinery import registry

PACKAGE = Path(__file__).parents[2] / "plugin_package"
ROOT = str(Path(__file__).parents[3])
aten = torch.ops.aten

SCRIPT = """
import json, sys, torch
from pathlib import Path
from bitlower.ir import BitlowerError, serialize
from bitlower.passes import Context, PassManager, find_pass, known_passes, load_plugin, parse_pipeline, providers

report = {"origin": [offer.origin for offer in providers()["fold-scales"]]}
report["loaded by listing"] = bool(known_passes()) and "fold_scales" in sys.modules
program = serialize.load(Path(sys.argv[1]))
data = [{"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}]
passes = parse_pipeline("fold-scales{max-ratio=4}")
result = PassManager(passes).run(program, Context(evaluation=data))
report["targets"] = [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
report["difference"] = float((result(**data[0])["y"] - program(**data[0])["y"]).abs().max())
report["passes"] = result.passes
report["unchanged"] = PassManager(parse_pipeline("fold-scales{max-ratio=1}")).run(program, Context()) is program
for name, action in {"typo": lambda: find_pass("fold-scale"), "twice": lambda: load_plugin(sys.argv[2])}.items():
    try:
        action()
    except BitlowerError as error:
        report[name] = str(error)
print(json.dumps(report))
"""


@pytest.fixture
def scaled() -> Program:
    """``y = linear(2 · x, w)``."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    product = graph.call_function(aten.mul.Tensor, (x, 2.0))
    result = graph.call_function(aten.linear.default, (product, weight))
    graph.output((result,))
    value, output = (TensorType(torch.float32, ("batch", size)) for size in (4, 5))
    for node, kind in ((x, value), (weight, TensorType(torch.float32, (5, 4))), (product, value), (result, output)):
        node.meta = {"type": kind, "path": "net"}
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(torch.randn(5, 4)))
    inputs, outputs = (ValueSpec("x", value),), (ValueSpec("y", output),)
    return Program({"model": torch.fx.GraphModule(module, graph)}, Level.FLOAT, "other", inputs, outputs)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin's distribution, built and installed by pip."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(run_script: Callable[..., Any], site: Path, program: Path, plugin: Path) -> dict[str, object]:
    done = run_script(SCRIPT, program, plugin, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_an_installed_plugin_is_found_loaded_when_named_and_run(
    scaled: Program, site: Path, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    serialize.save(scaled, tmp_path)
    report = run(run_script, site, tmp_path, PACKAGE / "fold_scales.py")
    assert report["origin"] == ["the distribution bitlower-fold-scales 1.2.3 (fold_scales:FoldScales)"]
    assert report["loaded by listing"] is False
    assert report["targets"] == ["aten.linear.default"]
    assert report["passes"] == ["fold-scales{max-ratio=4.0}"]
    assert float(str(report["difference"])) < 1e-5
    assert report["unchanged"] is True
    assert "unknown pass 'fold-scale'; did you mean 'fold-scales'?" in str(report["typo"])
    assert "'fold-scales' is offered by the file" in str(report["twice"])
    assert "and by the distribution bitlower-fold-scales 1.2.3" in str(report["twice"])


def _break(run_script: Callable[..., Any], site: Path, tmp_path: Path, code: str) -> str:
    """What is said of the installed plugin when its module holds ``code``."""
    folder = shutil.copytree(site, tmp_path / "site")
    (folder / "fold_scales.py").write_text(code)
    script = (
        "from bitlower.passes import find_pass\ntry: find_pass('fold-scales')\nexcept Exception as e: print(repr(e))"
    )
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    said: str = run_script(script, env=environment).stdout
    return said


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import json\n\n1 / 0\n", "fails to import: ZeroDivisionError: division by zero at fold_scales.py:3"),
        ("import sys\n\nsys.exit(0)\n", "fails to import: SystemExit: 0 at fold_scales.py:3"),
        ("FoldScales = 3\n", "FoldScales is no pass class; point at a subclass of bitlower.Pass"),
        ("x = 1\n", "fails to import: AttributeError"),
        (
            (PACKAGE / "fold_scales.py").read_text().replace('"fold-scales"', '"fold-other"'),
            "the entry point 'fold-scales' leads to the pass 'fold-other'; give both the same name",
        ),
    ],
)
def test_a_broken_installed_plugin_is_named(
    site: Path, tmp_path: Path, code: str, message: str, run_script: Callable[..., Any]
) -> None:
    said = _break(run_script, site, tmp_path, code)
    assert said.startswith("BitlowerError(")
    assert "the distribution bitlower-fold-scales 1.2.3 (fold_scales:FoldScales)" in said
    assert message in said


def test_the_same_file_works_loose(scaled: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    load_plugin(PACKAGE / "fold_scales.py")
    context = Context(evaluation=[{"x": torch.randn(3, 4)}])
    result = PassManager([make_pass("fold-scales")]).run(scaled, context)
    assert [n.target for n in result.graph.nodes if n.op == "call_function"] == [aten.linear.default]
    with pytest.raises(BitlowerError, match="'max-ratio' takes float"):
        make_pass("fold-scales", {"max-ratio": "large"})
