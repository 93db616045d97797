"""Where passes come from: own files by name, third-party distributions by entry point, loose files by path.

Nothing is imported before it is named. ``peg-permute`` is the only pass of ``peg_permute.py`` in this folder; another
distribution offers its passes as entry points of the group ``bitlower.passes``; a loose file is loaded by
:func:`load_plugin`. A name that two of these offer is an error that names both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bitlower.ir import BitlowerError, nearest
from bitlower.ir.files import check_name
from bitlower.passes import _parameters
from bitlower.passes._base import Pass
from bitlower.passes._declared import declaration_problem
from bitlower.passes._faults import blamed
from bitlower.passes._process import kept_process

GROUP = "bitlower.passes"
FOLDER = Path(__file__).parent
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LOOSE: dict[str, tuple[Path, type[Pass]]] = {}


@dataclass(frozen=True)
class Provider:
    """One offer of a pass: its name, and where it comes from in words; ``entry_point`` for third parties."""

    name: str
    origin: str
    entry_point: EntryPoint | None = None
    path: Path | None = None


def providers() -> dict[str, tuple[Provider, ...]]:
    """All offers by pass name; imports nothing."""
    offers = [
        Provider(path.stem.replace("_", "-"), f"bitlower ({path.name})", path=path) for path in sorted(own_files())
    ]
    offers += [Provider(name, f"the file {path}", path=path) for name, (path, _) in _LOOSE.items()]
    for point in sorted(set(entry_points(group=GROUP)), key=lambda p: (p.name, p.value)):
        name = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
        offers.append(Provider(point.name, f"the distribution {name} ({point.value})", entry_point=point))
    names = sorted({offer.name for offer in offers})
    return {name: tuple(offer for offer in offers if offer.name == name) for name in names}


def own_files() -> list[Path]:
    """The files of our own passes, here and in the folders below; names with an underscore in front hold none."""
    return [
        path
        for pattern in ("*.py", "*/*.py")
        for path in FOLDER.glob(pattern)
        if not any(part.startswith("_") for part in path.relative_to(FOLDER).parts)
    ]


def find_pass(name: str) -> type[Pass]:
    """The pass called ``name``; only the module that holds it is imported.

    Raises:
        BitlowerError: unknown (the nearest match is named), offered twice (both sides are named), or broken.
    """
    offers = providers()
    if name not in offers:
        raise BitlowerError(f"unknown pass {name!r}", hint=nearest(name, offers))
    if len(offers[name]) > 1:
        sides = " and by ".join(offer.origin for offer in offers[name])
        raise BitlowerError(f"the pass {name!r} is offered by {sides}", hint="remove or rename one of them")
    offer = offers[name][0]
    if offer.entry_point is not None:
        return _load_entry_point(offer, offer.entry_point)
    if name in _LOOSE or offer.path is None:
        return _LOOSE[name][1]
    return _load_own(name, offer.path)


def known_passes() -> dict[str, type[Pass]]:
    """Own passes and those of loaded plugins, by name; installed third-party ones are loaded only when named."""
    return {name: find_pass(name) for name, offers in providers().items() if offers[0].entry_point is None}


def make_pass(name: str, params: Mapping[str, Any] | None = None) -> Pass:
    """The pass ``name`` with ``params`` (plain data, names in kebab-case or with underscores).

    Raises:
        BitlowerError: an unknown pass or parameter, or a value that does not fit.
    """
    return _parameters.build(find_pass(name), params or {})


def load_plugin(path: str | Path) -> list[type[Pass]]:
    """Make the passes of a loose file known, and return them; loading a file again reads it again.

    Raises:
        BitlowerError: the file is missing, fails to import, defines no pass or a malformed one, or takes a known name.
    """
    path = check_name(path)
    if not path.is_file():
        raise BitlowerError(f"no plugin file {path}", hint="give the path of a Python file")
    module = _import_file(path)
    classes = [cls for cls in _defined_in(module) if "name" in cls.__dict__] or _defined_in(module)
    if not classes:
        raise BitlowerError(
            f"{path.name} defines no pass", hint="a pass is a frozen dataclass that derives from bitlower.Pass"
        )
    for cls in classes:
        check_class(cls, path.name)
    for cls in classes:
        others = [o for o in providers().get(cls.name, ()) if o.path is None or o.path.resolve() != path.resolve()]
        if others or sum(other.name == cls.name for other in classes) > 1:
            sides = " and by ".join([f"the file {path}", *(o.origin for o in others)])
            raise BitlowerError(f"the pass {cls.name!r} is offered by {sides}", hint="rename the plugin's pass")
    _LOOSE.update({cls.name: (path, cls) for cls in classes})
    return classes


def plugin_file(cls: type[Pass]) -> Path | None:
    """The loose file that ``cls`` came from, if it did."""
    path, known = _LOOSE.get(cls.name, (None, None))
    return path if known is cls else None


def check_class(cls: type[Pass], where: str) -> None:
    """Hold a pass class to the contract.

    Raises:
        BitlowerError: addressed to the pass's author; ``where`` names the file or distribution.
    """
    with blamed(f"{where}: the pass class {cls.__name__} cannot be read"):
        problem = _class_problem(cls) or _parameter_problem(cls)
    if problem:
        raise BitlowerError(f"{where}: the pass class {cls.__name__} {problem[0]}", hint=problem[1])


def _class_problem(cls: type[Pass]) -> tuple[str, str] | None:
    """What is wrong with the class, and the mend."""
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return "is not a frozen dataclass", "decorate it with @dataclass(frozen=True)"
    if "name" in cls.__annotations__ and any(f.name == "name" for f in dataclasses.fields(cls)):
        return "has `name` as a parameter", 'write `name = "my-pass"` without an annotation'
    if not isinstance(cls.name, str) or not cls.name:
        return "has no name", 'set `name = "my-pass"`'
    if not _KEBAB.fullmatch(cls.name):
        mended = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.name).lower()).strip("-")
        return f"has the name {cls.name!r}, which is not kebab-case", f"for example {mended!r}"
    if cls.run is Pass.run:
        return "defines no `run`", "write `def run(self, program, context) -> bool`"
    return declaration_problem(cls)


def _parameter_problem(cls: type[Pass]) -> tuple[str, str] | None:
    try:
        kinds = _parameters.parameter_types(cls)
    except NameError as error:
        return f"has a parameter of unknown type ({error})", "import the type at the top of the module"
    for name, kind in kinds.items():
        if not _parameters.supported(kind):
            shown = getattr(kind, "__name__", str(kind))
            return (
                f"has the parameter {name!r} of the unsupported type {shown}",
                "use bool, int, float, str, an enum, Literal, tuple[...] of these, X | None, "
                "or a class with `parse` or `from_dict`",
            )
    return None


def _load_own(name: str, path: Path) -> type[Pass]:
    place = path.relative_to(FOLDER)
    module = importlib.import_module(".".join(["bitlower.passes", *place.with_suffix("").parts]))
    classes = _defined_in(module)
    if len(classes) != 1 or classes[0].name != name:
        found = ", ".join(f"{cls.__name__} ({cls.name!r})" for cls in classes) or "none"
        raise BitlowerError(
            f"passes/{place.as_posix()} must define exactly one pass, called {name!r}; found: {found}",
            hint="one file holds one pass of its name; what it needs besides goes into a module with an underscore",
        )
    check_class(classes[0], f"passes/{place.as_posix()}")
    return classes[0]


def _load_entry_point(offer: Provider, point: EntryPoint) -> type[Pass]:
    source = None
    with suppress(ImportError, ValueError):
        source = importlib.util.find_spec(point.module.partition(".")[0])
    with kept_process(), blamed(f"{offer.origin} fails to import", source.origin if source else None):
        cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise BitlowerError(
            f"{offer.origin}: {point.attr} is no pass class", hint="point at a subclass of bitlower.Pass"
        )
    check_class(cls, offer.origin)
    if cls.name != offer.name:
        raise BitlowerError(
            f"{offer.origin}: the entry point {offer.name!r} leads to the pass {cls.name!r}",
            hint="give both the same name",
        )
    return cls


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
        raise BitlowerError(error.message, hint="decorate the pass with @dataclass(frozen=True)") from error.__cause__
    return module


def _defined_in(module: ModuleType) -> list[type[Pass]]:
    """The pass classes that ``module`` itself defines, in the order of the file."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
    ]
