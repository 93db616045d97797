"""The site of the documents and the API reference: it is built without a warning, and every public name is in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import bitlower
import bitlower.ir
import bitlower.passes

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-b", "html", DOCS, folder / "html"]
    ran = subprocess.run([*command, "-d", folder / "trees"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def names(site: Path) -> set[str]:
    """What can be linked to in the reference."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda _, name: name)
    return {name for kind, found in inventory.items() if kind.startswith("py:") for name in found}


def test_public_names_are_in_the_reference(names: set[str]) -> None:
    """Each in one place; a module that another offers, and an alias of a type, have none."""
    for module in (bitlower, bitlower.ir, bitlower.passes):
        for name in module.__all__:
            if getattr(getattr(module, name), "__module__", "").startswith("bitlower"):
                home = "bitlower" if name in bitlower.__all__ else module.__name__
                assert f"{home}.{name}" in names


def test_every_pass_is_in_the_reference_with_its_parameters(names: set[str]) -> None:
    for pass_ in bitlower.passes.known_passes().values():
        home = f"{pass_.__module__}.{pass_.__name__}"
        assert home in names
        assert not [field.name for field in fields(pass_) if f"{home}.{field.name}" not in names]


def test_documents_are_pages_that_the_contents_lead_to(site: Path) -> None:
    """Sphinx warns of a page that no table of contents names; here, that none was left out of the build."""
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= pages
