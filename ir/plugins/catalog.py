"""What is found by name: own files, third-party distributions by entry point, loose files by path.

Nothing is imported before it is named. A name that two of these offer is an error that names both.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from bitlower.ir.diagnostics import BitlowerError, nearest
from bitlower.ir.plugins import kinds
from bitlower.ir.plugins.faults import blamed
from bitlower.ir.plugins.process import kept_process


class Named(Protocol):
    """What a catalog holds: a class with a name."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)
Problem = tuple[str, str]
"""What is wrong with a class, and the fix."""
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Provider:
    """One offer: its name, and where it comes from in words; ``entry_point`` for third parties."""

    name: str
    origin: str
    entry_point: EntryPoint | None = None
    path: Path | None = None


@dataclass
class Catalog(Generic[T]):
    """All of one kind, by kebab-case names.

    Args:
        what: the kind in words.
        base: what its classes derive from.
        home: under which name users import ``base``.
        group: the entry points of third parties.
        package: where own files lie: one of the kind a file, called like it.
        folder: the folder of that package.
        problem: what is wrong with a class, beyond what holds for all kinds.
        file: the file that holds each, where each has a folder of its name; "": a file has its name.
        loose: file and class by name, of the loose files that were loaded.
    """

    what: str
    base: type[T]
    home: str
    group: str
    package: str
    folder: Path
    problem: Callable[[type[T]], Problem | None]
    file: str = ""
    loose: dict[str, tuple[Path, type[T]]] = field(default_factory=dict)

    def providers(self) -> dict[str, tuple[Provider, ...]]:
        """All offers by name; imports nothing."""
        offers = [
            Provider(self._name_of(path), f"bitlower ({path.name})", path=path) for path in sorted(self.own_files())
        ]
        offers += [Provider(name, f"the file {path}", path=path) for name, (path, _) in self.loose.items()]
        for point in _installed(self.group):
            name = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
            offers.append(Provider(point.name, f"the distribution {name} ({point.value})", entry_point=point))
        names = sorted({offer.name for offer in offers})
        return {name: tuple(offer for offer in offers if offer.name == name) for name in names}

    def own_files(self) -> list[Path]:
        """Our own files, in the folder and in those below; names with an underscore in front hold none."""
        if self.file:
            return list(self.folder.glob(f"*/{self.file}.py"))
        return [
            path
            for pattern in ("*.py", "*/*.py")
            for path in self.folder.glob(pattern)
            if not any(part.startswith("_") for part in path.relative_to(self.folder).parts)
        ]

    def _name_of(self, path: Path) -> str:
        return (path.parent.name if self.file else path.stem).replace("_", "-")

    def find(self, name: str) -> type[T]:
        """The class called ``name``; only the module that holds it is imported.

        Raises:
            BitlowerError: unknown (the nearest match is named), offered twice (both sides are named), or broken.
        """
        offers = self.providers()
        if name not in offers:
            raise BitlowerError(f"unknown {self.what} {name!r}", hint=nearest(name, offers))
        if len(offers[name]) > 1:
            sides = " and by ".join(offer.origin for offer in offers[name])
            raise BitlowerError(f"the {self.what} {name!r} is offered by {sides}", hint="remove or rename one of them")
        offer = offers[name][0]
        if offer.entry_point is not None:
            return self._load_entry_point(offer, offer.entry_point)
        if name in self.loose or offer.path is None:
            return self.loose[name][1]
        return self._load_own(name, offer.path)

    def known(self) -> dict[str, type[T]]:
        """Own classes and those of loose files, by name; installed third-party ones are loaded only when named."""
        return {name: self.find(name) for name, offers in self.providers().items() if offers[0].entry_point is None}

    def defined_in(self, module: ModuleType) -> list[type[T]]:
        """The classes that ``module`` itself defines, in the order of the file."""
        return [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, self.base) and value.__module__ == module.__name__
        ]

    def check_loose(self, classes: list[type[T]], path: Path) -> None:
        """Hold what the loose file ``path`` defines to the contract.

        Raises:
            BitlowerError: a class is malformed, or takes a known name.
        """
        for cls in classes:
            self.check(cls, path.name)
        for cls in classes:
            offers = self.providers().get(cls.name, ())
            others = [o for o in offers if o.path is None or o.path.resolve() != path.resolve()]
            if others or sum(other.name == cls.name for other in classes) > 1:
                sides = " and by ".join([f"the file {path}", *(o.origin for o in others)])
                raise BitlowerError(
                    f"the {self.what} {cls.name!r} is offered by {sides}", hint=f"rename the plugin's {self.what}"
                )

    def check(self, cls: type[T], where: str) -> None:
        """Hold a class to the contract.

        Raises:
            BitlowerError: addressed to the author of the class; ``where`` names the file or distribution.
        """
        with blamed(f"{where}: the {self.what} class {cls.__name__} cannot be read"):
            problem = self._class_problem(cls) or self.problem(cls) or _parameter_problem(cls)
        if problem:
            raise BitlowerError(f"{where}: the {self.what} class {cls.__name__} {problem[0]}", hint=problem[1])

    def _class_problem(self, cls: type[T]) -> Problem | None:
        parameters = cls.__dict__.get("__dataclass_params__")
        fixed = f'write `name = "my-{self.what}"` without an annotation'
        if parameters is None or not parameters.frozen:
            return "is not a frozen dataclass", "decorate it with @dataclass(frozen=True)"
        fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]  # it is a dataclass, as was seen
        if "name" in cls.__annotations__ and any(field.name == "name" for field in fields):
            return "has `name` as a parameter", fixed
        if not isinstance(cls.name, str) or not cls.name:
            return "has no name", f'set `name = "my-{self.what}"`'
        if not _KEBAB.fullmatch(cls.name):
            fixed = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.name).lower()).strip("-")
            return f"has the name {cls.name!r}, which is not kebab-case", f"for example {fixed!r}"
        return None

    def _load_own(self, name: str, path: Path) -> type[T]:
        place = path.relative_to(self.folder)
        shown = "/".join([*self.package.split(".")[1:], place.as_posix()])
        module = importlib.import_module(".".join([self.package, *place.with_suffix("").parts]))
        classes = self.defined_in(module)
        if len(classes) != 1 or classes[0].name != name:
            names = ", ".join(f"{cls.__name__} ({cls.name!r})" for cls in classes) or "none"
            raise BitlowerError(
                f"{shown} must define exactly one {self.what}, called {name!r}; found: {names}",
                hint=f"one file holds one {self.what} of its name; what it needs besides goes into a module with an "
                "underscore",
            )
        self.check(classes[0], shown)
        return classes[0]

    def _load_entry_point(self, offer: Provider, point: EntryPoint) -> type[T]:
        source = None
        with suppress(ImportError, ValueError):
            source = importlib.util.find_spec(point.module.partition(".")[0])
        with kept_process(), blamed(f"{offer.origin} fails to import", source.origin if source else None):
            cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise BitlowerError(
                f"{offer.origin}: {point.attr} is no {self.what} class", hint=f"point at a subclass of {self.home}"
            )
        self.check(cls, offer.origin)
        if cls.name != offer.name:
            raise BitlowerError(
                f"{offer.origin}: the entry point {offer.name!r} leads to the {self.what} {cls.name!r}",
                hint="give both the same name",
            )
        return cls


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read anew when the path has changed or a folder on it."""
    stamps = []
    for place in sys.path:
        with suppress(OSError):
            stamps.append((place, os.stat(place or os.curdir).st_mtime_ns))
    return _read_entry_points(group, tuple(stamps))


@lru_cache(maxsize=8)
def _read_entry_points(group: str, stamps: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(sorted(set(entry_points(group=group)), key=lambda point: (point.name, point.value)))


def _parameter_problem(cls: type[Any]) -> Problem | None:
    try:
        annotations = kinds.parameter_types(cls)
    except NameError as error:
        return f"has a parameter of unknown type ({error})", "import the type at the top of the module"
    for name, kind in annotations.items():
        if not kinds.supported(kind):
            shown = getattr(kind, "__name__", str(kind))
            return (
                f"has the parameter {name!r} of the unsupported type {shown}",
                "use bool, int, float, str, an enum, Literal, tuple[...] of these, X | None, "
                "or a class with `parse`, `from_dict` or `from_list`; bounds are those of annotated-types",
            )
    return None
