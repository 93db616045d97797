"""Passes by name, and plugin files, which define passes, losses or both.

``peg-permute`` is the only pass of ``peg_permute.py`` in one of the families; another distribution offers its passes as
entry points of the group ``bitlower.passes``; a loose file is loaded by :func:`load_plugin`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bitlower.ir import BitlowerError
from bitlower.ir.files import check_name
from bitlower.ir.plugins import parameters
from bitlower.ir.plugins.catalog import Catalog, Problem, Provider
from bitlower.ir.plugins.faults import blamed, source_of
from bitlower.ir.plugins.process import kept_process
from bitlower.passes._machinery.base import Pass
from bitlower.passes._machinery.declared import check_declared, declaration_problem
from bitlower.passes._machinery.loss import Loss, Objective
from bitlower.passes._machinery.losses import LOSSES


def _problem(cls: type[Pass]) -> Problem | None:
    if cls.run is Pass.run:
        return "defines no `run`", "write `def run(self, program, context) -> bool`"
    return declaration_problem(cls)


PASSES: Catalog[Pass] = Catalog(
    "pass", Pass, "bitlower.Pass", "bitlower.passes", "bitlower.passes", Path(__file__).parents[1], _problem
)


def providers() -> dict[str, tuple[Provider, ...]]:
    """All offers of passes by name; imports nothing."""
    return PASSES.providers()


def find_pass(name: str) -> type[Pass]:
    """The pass called ``name``; only the module that holds it is imported.

    Raises:
        BitlowerError: unknown (the nearest match is named), offered twice (both sides are named), or broken.
    """
    return PASSES.find(name)


def known_passes() -> dict[str, type[Pass]]:
    """Own passes and those of loaded plugins, by name; installed third-party ones are loaded only when named."""
    return PASSES.known()


def make_pass(name: str, params: Mapping[str, Any] | None = None) -> Pass:
    """The pass ``name`` with ``params`` (plain data, names in kebab-case or with underscores).

    Raises:
        BitlowerError: an unknown pass or parameter, or a value that does not fit.
    """
    return build(find_pass(name), params or {})


def load_plugin(path: str | Path) -> list[type[Pass | Loss]]:
    """Make the passes and losses of a loose file known, and return them; loading a file again reads it again.

    Raises:
        BitlowerError: the file is missing, fails to import, defines no pass and no loss or a malformed one, or takes a
            known name.
    """
    path = check_name(path)
    if not path.is_file():
        raise BitlowerError(f"no plugin file {path}", hint="give the path of a Python file")
    module = _import_file(path)
    passes, losses = PASSES.defined_in(module), LOSSES.defined_in(module)
    if any("name" in cls.__dict__ for cls in [*passes, *losses]):
        passes = [cls for cls in passes if "name" in cls.__dict__]
        losses = [cls for cls in losses if "name" in cls.__dict__]
    if not passes and not losses:
        raise BitlowerError(
            f"{path.name} defines no pass and no loss",
            hint=f"they are frozen dataclasses that derive from {PASSES.home} or {LOSSES.home}",
        )
    PASSES.check_loose(passes, path)
    LOSSES.check_loose(losses, path)
    PASSES.loose.update({cls.name: (path, cls) for cls in passes})
    LOSSES.loose.update({cls.name: (path, cls) for cls in losses})
    return [*passes, *losses]


def classes_of(pass_: Pass) -> list[type[Pass | Loss]]:
    """The classes that compute ``pass_``: its own and those of the losses among its parameters."""
    values = [getattr(pass_, field.name) for field in dataclasses.fields(pass_)]
    losses = [loss for value in values if isinstance(value, Objective) for loss in value.losses]
    return [type(pass_), *map(type, losses)]


def build(cls: type[Pass], values: Mapping[str, Any]) -> Pass:
    """The pass with ``values``, in kebab-case or with underscores, checked against the fields' annotations.

    Raises:
        BitlowerError: a parameter is unknown, doubled, missing, of the wrong type, or refused by the pass, whose code
            may fail in any way.
    """
    with blamed(f"pass {cls.name!r} cannot be made", source_of(cls)):
        pass_ = parameters.make(cls, f"pass {cls.name!r}", values)
        check_declared(pass_)
        return pass_


def plugin_files(pass_: Pass) -> dict[Path, list[str]]:
    """The loose files that ``pass_`` and its losses came from, with the names of what each gave."""
    loose = [*PASSES.loose.values(), *LOSSES.loose.values()]
    names_by_file: dict[Path, list[str]] = {}
    for used in classes_of(pass_):
        for path, cls in loose:
            if cls is used:
                names_by_file.setdefault(path, []).append(cls.name)
    return names_by_file


def _import_file(path: Path) -> ModuleType:
    """Run ``path`` as a module whose name follows from its stem and contents."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"bitlower_plugin_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.origin is None:
        raise BitlowerError(f"{path} is not a Python file", hint="a plugin's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with kept_process(), blamed(f"the plugin {path.name} fails to import", spec.origin):
            exec(compile(path.read_bytes(), spec.origin, "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if "from a frozen" not in str(error) or not isinstance(error, BitlowerError):
            raise
        raise BitlowerError(error.message, hint="decorate the class with @dataclass(frozen=True)") from error.__cause__
    return module
