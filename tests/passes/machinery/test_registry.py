from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitlower.passes
from bitlower.ir import BitlowerError
from bitlower.passes import find_pass, known_passes, load_plugin, make_pass, providers
from bitlower.passes._machinery import registry

GOOD = """
from dataclasses import dataclass
from bitlower.passes import Pass

@dataclass(frozen=True)
class Halve(Pass):
    name = "halve"
    times: int = 1

    def run(self, program):
        return False
"""


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without loaded plugins."""
    monkeypatch.setattr(registry.PASSES, "loose", {})


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of own passes, besides the real one for imports, instead of it for the search."""
    monkeypatch.setattr(registry.PASSES, "folder", tmp_path)
    monkeypatch.setattr(bitlower.passes, "__path__", [*bitlower.passes.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_own_file_holds_the_pass_of_its_name() -> None:
    folder = Path(bitlower.passes.__file__).parent
    places = [p.relative_to(folder) for p in (*folder.glob("*.py"), *folder.glob("*/*.py"))]
    files = [place for place in places if not any(part.startswith("_") for part in place.parts)]
    families = {"canonical", "lowering", "outliers", "precision", "quantizers", "rounding", "training"}
    assert {place.parent.name for place in files} == families
    for file in files:
        cls = find_pass(file.stem.replace("_", "-"))
        assert cls.__module__ == ".".join(["bitlower.passes", *file.with_suffix("").parts])
        assert cls.name == file.stem.replace("_", "-")
    assert {cls.__module__.rpartition(".")[2] for cls in known_passes().values()} == {f.stem for f in files}


def test_finding_one_pass_imports_no_other() -> None:
    code = "import sys; from bitlower.passes import find_pass; find_pass('clean'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {f"bitlower.passes.{p.parent.name}.{p.stem}" for p in registry.PASSES.own_files()}
    assert own & set(loaded) == {"bitlower.passes.canonical.clean"}


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BitlowerError, match=r"unknown pass 'clen'; did you mean 'clean'\? known: .*quantize"):
        find_pass("clen")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "none"),
        (GOOD, "Halve ('halve')"),
        (GOOD.replace('"halve"', '"my-pass"') + GOOD, "Halve ('halve')"),
        (GOOD.replace('"halve"', '"my-pass"') + GOOD.replace("Halve", "Other"), "Halve ('my-pass'), Other ('halve')"),
    ],
)
def test_an_own_file_must_hold_exactly_its_pass(own_folder: Path, text: str, found: str) -> None:
    write(own_folder / "my_pass.py", text)
    with pytest.raises(
        BitlowerError, match=r"passes/my_pass.py must define exactly one pass, called 'my-pass'"
    ) as info:
        find_pass("my-pass")
    assert f"found: {found}" in str(info.value)


def test_an_own_pass_may_import_another(own_folder: Path) -> None:
    write(own_folder / "halve.py", GOOD)
    text = GOOD.replace("import Pass", "import Pass\nfrom bitlower.passes.halve import Halve")
    write(own_folder / "quarter.py", text.replace("class Halve", "class Quarter").replace('"halve"', '"quarter"'))
    assert find_pass("quarter").__name__ == "Quarter"


def test_a_loose_file_is_found_by_its_pass_name(tmp_path: Path) -> None:
    (cls,) = load_plugin(write(tmp_path / "my-plugin.py", GOOD))
    assert find_pass("halve") is cls
    assert known_passes()["halve"] is cls
    assert make_pass("halve", {"times": 3}).times == 3  # type: ignore[attr-defined]
    assert str(tmp_path / "my-plugin.py") in providers()["halve"][0].origin
    assert not list(tmp_path.glob("__pycache__"))


def test_a_loose_file_can_be_loaded_again_after_an_edit(tmp_path: Path) -> None:
    load_plugin(write(tmp_path / "p.py", GOOD))
    load_plugin(write(tmp_path / "p.py", GOOD.replace("times: int = 1", "times: int = 7")))
    assert make_pass("halve").times == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"p.py defines no pass and no loss; they are frozen dataclasses"),
        ("x = 1\ny = undefined\n", r"the plugin p.py fails to import: NameError: name 'undefined' .* at p.py:2$"),
        ("x = (\n", r"the plugin p.py fails to import: SyntaxError: '\(' was never closed at p.py:1$"),
        ("raise SystemExit(3)", r"p.py fails to import: SystemExit: 3 at p.py:1$"),
        ("import json\njson.loads('{')\n", r"JSONDecodeError: .* at p.py:2$"),
        (GOOD.replace('"halve"', '"HalveIt"'), r"the name 'HalveIt', which is not kebab-case; for example 'halve-it'"),
        (
            GOOD.replace('"halve"', '"halve it"'),
            r"the name 'halve it', which is not kebab-case; for example 'halve-it'",
        ),
        (GOOD.replace('name = "halve"', ""), r"the pass class Halve has no name"),
        (GOOD.replace("name =", "name: str ="), r"has `name` as a parameter"),
        (GOOD.replace("@dataclass(frozen=True)", ""), r"Halve is not a frozen dataclass; decorate it with"),
        (GOOD.replace("(frozen=True)", ""), r"TypeError: .* at p.py:\d+; decorate the class with @dataclass\(frozen"),
        (GOOD.replace("times: int = 1", "times: dict = None"), r"the parameter 'times' of the unsupported type dict"),
        (GOOD.replace("times: int = 1", "times: 'Nope' = 1"), r"a parameter of unknown type \(name 'Nope'"),
        (GOOD.replace("def run", "def walk"), r"the pass class Halve defines no `run`"),
        (GOOD.replace("times: int = 1", 'contract = "exact"'), r"has the contract 'exact'"),
        (GOOD.replace("times: int = 1", 'requires = "float"'), r"has no proper levels"),
        (GOOD.replace('"halve"', '"clean"'), r"'clean' is offered by the file .*p.py and by bitlower \(clean.py\)"),
        (GOOD + GOOD.replace("Halve", "Other"), r"'halve' is offered by the file"),
    ],
)
def test_a_bad_plugin_is_refused_with_its_own_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BitlowerError, match=message) as info:
        load_plugin(write(tmp_path / "p.py", text))
    assert "\n" not in str(info.value)
    assert registry.PASSES.loose == {}


def test_a_missing_plugin_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match=r"no plugin file .*nowhere.py"):
        load_plugin(tmp_path / "nowhere.py")


def test_two_loose_files_cannot_share_a_name(tmp_path: Path) -> None:
    load_plugin(write(tmp_path / "a.py", GOOD))
    with pytest.raises(BitlowerError, match=r"'halve' is offered by the file .*b.py and by the file .*a.py"):
        load_plugin(write(tmp_path / "b.py", GOOD))
