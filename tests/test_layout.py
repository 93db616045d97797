"""The shape of the repository: packages, the order of imports, one file a pass, small files, what a wheel holds."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import networkx
import pytest

from bitlower.backends.registry import known_backends
from bitlower.passes import Pass
from bitlower.passes._machinery.losses import find_loss

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
TOP = ("bitlower", "ir", "passes", "frontends", "backends", "tools")
MAY_IMPORT = {
    "ir": {"ir"},
    "frontends": {"ir", "frontends"},
    "passes": {"ir", "passes"},
    "backends": {"ir", "backends"},
    "tools": {"bitlower", *TOP},
    "bitlower": {"bitlower", *TOP},
}
SOURCES = [path.relative_to(ROOT) for folder in TOP for path in sorted((ROOT / folder).rglob("*.py"))]
LOSS_FILES = [
    path for path in SOURCES if path.parent == Path("passes/training/_losses") and not path.name.startswith("_")
]
PASS_FILES = [
    path.relative_to("passes")
    for path in SOURCES
    if path.parts[0] == "passes" and not any(part.startswith("_") for part in path.parts)
]


def _package(folder):
    """The name under which a folder of the checkout is imported."""
    return ".".join(folder.parts if folder.parts[0] == "bitlower" else ("bitlower", *folder.parts))


def test_pyproject_names_every_package():
    """One that is missing would vanish from the wheel without a warning."""
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert {_package(folder) for folder in folders} == set(SETUPTOOLS["packages"])
    assert {name: Path(path) for name, path in SETUPTOOLS["package-dir"].items()} == {_package(f): f for f in folders}


def test_every_source_file_lies_in_a_package():
    for path in SOURCES:
        assert (ROOT / path.parent / "__init__.py").is_file(), f"{path} is in a folder without __init__.py"


def _imported(path):
    """The modules that a file imports, anywhere in it, as far as the text says."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"bitlower.{alias.name}" for alias in node.names]
            yield from names if node.module == "bitlower" else [node.module]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_import_runs_back_up(path):
    for module in _imported(path):
        first, *rest = module.split(".")
        assert first not in TOP[1:], f"{path} imports {module}: write bitlower.{module}"
        target = rest[0] if rest and rest[0] in TOP else "bitlower"
        if first == "bitlower":
            allowed = MAY_IMPORT[path.parts[0]]
            assert target in allowed, f"{path} imports {module}; {path.parts[0]} may import {sorted(allowed)}"


BESIDE = {"precision": {"quantizers"}}
"""The families of passes that import others; all may import ``_machinery``."""


def _modules(folder):
    """The modules below a folder of the checkout by name."""
    return {
        _package(path.with_suffix("")).removesuffix(".__init__"): path for path in SOURCES if path.parts[0] == folder
    }


def _imports(path, known):
    """The modules of ``known`` that a file imports; for types alone too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield from {name if name in known else node.module} & known.keys()


def _family(path):
    return path.parts[1] if len(path.parts) > 2 else ""


def test_families_of_passes_import_no_others_but_these():
    known = _modules("passes")
    for path in known.values():
        for name in _imports(path, known):
            own, other = _family(path), _family(known[name])
            allowed = {own, "_machinery", *BESIDE.get(own, ())} if own else {"_machinery"}
            assert other in allowed, f"{path} imports {name}; {own or 'the package'} may import {sorted(allowed)}"


def test_no_pass_pulls_in_another_for_a_type():
    """What `lower-integer` imports, and what that imports, holds no other pass."""
    known = _modules("passes")
    seen, frontier = set(), [Path("passes/lowering/lower_integer.py")]
    while frontier:
        path = frontier.pop()
        if path not in seen:
            seen.add(path)
            frontier += [known[name] for name in _imports(path, known)]
    assert [path.name for path in seen if path.relative_to("passes") in PASS_FILES] == ["lower_integer.py"]


@pytest.mark.parametrize("folder", ["ir", "passes", "frontends", "backends", "tools"])
def test_no_import_goes_in_a_circle(folder):
    known = _modules(folder)
    graph = networkx.DiGraph()
    for name, path in known.items():
        graph.add_edges_from((name, other) for other in _imports(path, known))
    assert [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1] == []


def _private(name):
    """The package that an underscore in a module's name keeps to itself; None without one."""
    parts = name.split(".")
    return next(
        (".".join(parts[:i]) for i, part in enumerate(parts) if part.startswith("_") and part != "__main__"), None
    )


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_begins_with_an_underscore_is_imported_from_its_own_folder(path):
    known = {name: other for folder in TOP for name, other in _modules(folder).items()}
    own = _package(path.with_suffix("")).removesuffix(".__init__")
    for name in _imports(path, known):
        owner = _private(name)
        assert owner is None or f"{own}.".startswith(f"{owner}."), f"{path} imports {name}, which belongs to {owner}"


NAMED_IN = {
    "tools/runs/standard.py": "what the one-line command stands for",
    "tools/runs/flow.py": "`bitlower analyze`",
    "tools/evaluation/language_model.py": "the method `gptq` of transformers",
}
"""The files of ``tools/`` that may name passes and backends, and why."""


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "tools"], ids=str)
def test_tools_know_no_pass_and_no_backend_by_name(path):
    known = {file.stem.replace("_", "-") for file in PASS_FILES} | set(known_backends())
    commands = {"quantize"} if path.parts[1] == "cli" else set()
    named = {
        node.value
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known - commands
    }
    assert not named or str(path) in NAMED_IN, f"{path} names {sorted(named)}: let the pass or the backend say it"


IMPORTED_AS = {"apache-tvm": "tvm", "apache-tvm-ffi": "tvm-ffi", "pillow": "PIL"}


def _by_place(path):
    """Where a file reads an argument of a node by its place: ``.args[…]``, ``operand(node, 1)``, a literal number."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "args":
            yield f"{path}:{node.lineno}"
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("operand", "argument")
            and len(node.args) > 1
        ):
            place = node.args[1]
            if isinstance(place, ast.Constant) and isinstance(place.value, int):
                yield f"{path}:{node.lineno}"


def test_outside_the_ir_arguments_of_nodes_have_names():
    outside = [path for path in SOURCES if path.parts[0] != "ir"]
    assert not [place for path in outside for place in _by_place(path)], (
        "use argument, operand or a view (docs/operators.md)"
    )


def _is_number(value):
    if isinstance(value, ast.Tuple):
        return all(map(_is_number, value.elts))
    if isinstance(value, ast.BinOp):
        return _is_number(value.left) and _is_number(value.right)
    value = value.operand if isinstance(value, ast.UnaryOp) else value
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] != "backends"], ids=str)
def test_a_number_with_a_name_says_what_it_is(path):
    """A docstring below it or a comment, its own or that of the lines around it without an empty one between."""
    text = (ROOT / path).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper() and _is_number(node.value):
            lines = text.splitlines()
            start, stop = node.lineno - 1, node.end_lineno
            while start and lines[start - 1]:
                start -= 1
            while stop < len(lines) and lines[stop]:
                stop += 1
            assert re.search(r'^"""|#', "\n".join(lines[start:stop]), re.MULTILINE), f"{path}:{node.lineno}"


def test_no_two_classes_have_one_name():
    """Where a name is searched for, one thing is found; losses have the names of their files."""
    homes = {}
    for path in SOURCES:
        if path.parts[0] != "backends" and path not in LOSS_FILES:
            for node in ast.parse((ROOT / path).read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(str(path))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


RETIRED = {"artefact", "closed", "door", "mend", "mended", "opened", "twin"}
"""Words that identifiers had before they got those of the field: artifact, calibrated, fix, uncalibrated, reference."""
VAGUE = {"found", "give", "given", "gives", "held", "kept", "moved", "taken"}
"""Names that do not say what a value is; one of them is a key of ``verification.json``."""


def _names(tree):
    """Every name that a module defines: functions, classes, parameters, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield node.name or ""
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_identifiers_are_free_of_retired_words(path):
    for name in _names(ast.parse((ROOT / path).read_text())):
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
        assert not RETIRED & set(words), f"{path}: {name}"
        assert name not in VAGUE or (path.name, name) == ("runtime_kernels.py", "found"), f"{path}: {name}"


def test_every_import_is_a_declared_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [line for extra in extras if extra not in ("test", "dev") for line in extras[extra]]
    declared = {re.split(r"[<>=!~ \[]", line)[0] for line in [*PROJECT["project"]["dependencies"], *optional]}
    names = {IMPORTED_AS.get(name, name).replace("-", "_").split(".")[0] for name in declared}
    for path in SOURCES:
        for module in _imported(path):
            first = module.split(".")[0]
            known = first in names or first in sys.stdlib_module_names or first == "bitlower"
            assert known, f"{path} imports {first}, which pyproject.toml does not declare"


def test_ruff_bans_the_bare_names():
    pytest.importorskip("ruff")
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(TOP) - {"bitlower"}
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--stdin-filename", "passes/x.py", "--output-format", "concise", "-"],
        input='"""A module."""\n\nfrom ir import Program\n\nprint(Program)\n',
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "TID251" in done.stdout
    assert "write bitlower.ir" in done.stdout


@pytest.mark.parametrize("path", PASS_FILES, ids=str)
def test_a_pass_file_holds_one_pass_of_its_name_and_has_a_test(path):
    module = importlib.import_module(".".join(["bitlower.passes", *path.with_suffix("").parts]))
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    passes = [cls for cls in own if issubclass(cls, Pass)]
    assert [cls.name for cls in passes] == [path.stem.replace("_", "-")]
    assert passes[0].__doc__
    assert (ROOT / "tests" / "passes" / path.parent / f"test_{path.name}").is_file(), (
        f"{path} has no test file of its own"
    )


@pytest.mark.parametrize("path", LOSS_FILES, ids=str)
def test_a_loss_file_holds_one_loss_of_its_name_and_has_a_test(path):
    loss = find_loss(path.stem.replace("_", "-"))
    assert loss.__module__ == _package(path.with_suffix(""))
    assert loss.__doc__
    test = ROOT / "tests" / "passes" / "training" / "losses" / f"test_{path.name}"
    assert test.is_file(), f"{path} has no test file of its own"


def _files():
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], capture_output=True, text=True, cwd=ROOT
    )
    listed = [ROOT / line for line in done.stdout.splitlines()]
    return listed if done.returncode == 0 and listed else [ROOT / path for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_says_what_it_is(path):
    tree = ast.parse((ROOT / path).read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno}: {node.name} has over 60 lines"


def _resolves(name):
    """Whether a dotted name leads to a module, or to something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_docstrings_point_at_is_there(path):
    for name in re.findall(r":(?:func|class|mod|data|meth|attr):`~?(bitlower\.[\w.]+)`", (ROOT / path).read_text()):
        assert _resolves(name), f"{path} points at {name}"


def test_no_file_is_over_400_lines():
    too_long = {str(path.relative_to(ROOT)): n for path in _files() if (n := path.read_text().count("\n")) > 400}
    assert not too_long


def test_numbers_that_must_agree_do():
    assert PROJECT["project"]["license-files"] == ["LICENSE", "NOTICE"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
    assert any(d.startswith("torch>=2.13") for d in PROJECT["project"]["dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for folder in TOP:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    readme = ROOT / PROJECT["project"]["readme"]
    (copy / readme.name).write_text(readme.read_text())
    command = ["build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_bitlower_and_nothing_beside_it(wheel):
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {n.parts[0].split("-")[0] for n in names} == {"bitlower"}
    installed = {n for n in names if n.parts[0] == "bitlower"}
    sources = [*SOURCES, *(path.relative_to(ROOT) for path in ROOT.glob("tools/report/templates/*"))]
    expected = {Path("bitlower") / p if p.parts[0] != "bitlower" else p for p in sources}
    assert installed == expected | {Path("bitlower/py.typed")}
    assert {n.name for n in names if "licenses" in n.parts} == {"LICENSE", "NOTICE"}


def test_the_wheel_is_bitlower_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = "import bitlower, bitlower.ir, bitlower.passes; print(bitlower.ir.__file__, len(bitlower.__path__))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.split() == [str(tmp_path / "bitlower" / "ir" / "__init__.py"), "1"]


@pytest.mark.parametrize("module", ["bitlower", "bitlower.ir", "bitlower.passes", "bitlower.tools.cli"])
def test_importing_is_light(module):
    script = f"import sys, {module}; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    loaded = set(done.stdout.split())
    assert module in loaded
    heavy = {"transformers", "onnxruntime", "onnx", "onnxscript", "torch.onnx._internal.exporter", "scipy", "tvm"}
    assert not heavy & loaded
