"""How Sphinx builds the site of these documents and the API reference: ``make docs``."""

from __future__ import annotations

from types import FunctionType, ModuleType

import bitlower
import bitlower.ir
import bitlower.passes
from bitlower.passes import known_passes

project, release = "bitlower", bitlower.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"bitlower {release}"
myst_heading_anchors = 4
# Links to files of the checkout that are no documents; tests/test_docs.py follows each of them.
suppress_warnings = ["myst.xref_missing"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False


def _names_of(module: ModuleType) -> str:
    """An entry for each class and function that ``module`` offers; those that ``bitlower`` does have one there."""
    entries = []
    for name in module.__all__:
        value = getattr(module, name)
        if module is not bitlower and name in bitlower.__all__:
            continue
        if isinstance(value, type):
            entries.append(f".. autoclass:: {module.__name__}.{name}\n")
        elif isinstance(value, FunctionType):
            entries.append(f".. autofunction:: {module.__name__}.{name}\n")
    return "\n".join(entries)


def _list_names(app: object, page: str, source: list[str]) -> None:
    """Fill in the names of a module, and every pass that is found."""
    modules = sorted({pass_.__module__ for pass_ in known_passes().values()})
    passes = "\n".join(f".. automodule:: {module}\n   :inherited-members: Pass\n" for module in modules)
    lists = {f"|names of {m.__name__}|": _names_of(m) for m in (bitlower, bitlower.ir, bitlower.passes)}
    for mark, text in {**lists, "|passes|": passes}.items():
        source[0] = source[0].replace(mark, text)


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _list_names)  # type: ignore[attr-defined]
