"""Backends by name: the folder ``backends/onnx_qdq`` holds ``onnx-qdq``; third parties offer theirs by entry point."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitlower.backends.artifact.manifest import FILE, check_if_artifact, is_artifact
from bitlower.backends.base import Backend
from bitlower.ir import BitlowerError, CheckError, nearest
from bitlower.ir.files import check_name, reason
from bitlower.ir.json_files import read_json
from bitlower.ir.plugins import parameters
from bitlower.ir.plugins.catalog import Catalog
from bitlower.ir.plugins.faults import blamed, source_of

BACKENDS: Catalog[Backend] = Catalog(
    what="backend",
    base=Backend,  # type: ignore[type-abstract]  # classes that derive from it are found
    home="bitlower.Backend",
    group="bitlower.backends",
    package="bitlower.backends",
    folder=Path(__file__).parent,
    problem=lambda cls: None,
    file="backend",
)


def known_backends() -> list[str]:
    """The names of all backends; imports none."""
    return sorted(BACKENDS.providers())


def find_backend(name: str) -> type[Backend]:
    """The backend called ``name``; only the module that holds it is imported.

    Raises:
        BitlowerError: unknown (the nearest match is named), offered twice (both sides are named), or broken.
    """
    return BACKENDS.find(name)


def make_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The backend ``name`` with ``options`` (plain data, names in kebab-case or with underscores).

    Raises:
        BitlowerError: an unknown backend or option (the nearest match is named), or a value that does not fit.
    """
    cls = find_backend(name)
    with answering(cls):
        return parameters.make(cls, f"backend {name!r}", options or {}, noun="option")


def writer_of(folder: Path) -> type[Backend] | None:
    """The backend that wrote the artifact in ``folder``; None for a folder that is no artifact.

    Raises:
        BitlowerError: its manifest is damaged, or names a backend that is not there.
        CheckError: a file is missing or changed.
    """
    if not is_artifact(folder):
        return None
    check_if_artifact(folder)
    return find_backend(_written_by(folder))


def verify_artifact(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Check an artifact with the backend that wrote it, and return its report as plain data.

    >>> verify_artifact("minilm-w8a8")["headline"]  # doctest: +SKIP

    Args:
        folder: the artifact's; nothing but its files is needed.

    Raises:
        BitlowerError: not an artifact.
        CheckError: a file is missing or changed, or the model does not compute what it did.
    """
    place = check_name(folder)
    name = _written_by(place)
    if name not in known_backends():
        raise BitlowerError(f"{place / FILE} names the unknown backend {name!r}", hint=nearest(name, known_backends()))
    try:
        return find_backend(name).verify(place).to_dict()
    except BitlowerError:
        raise
    except Exception as error:  # what is damaged makes the runtimes raise many kinds
        line = next(iter(str(error).splitlines()), "")
        raise CheckError(f"{folder} is damaged: {type(error).__name__}: {line}") from error


@contextmanager
def answering(cls: type[Backend]) -> Iterator[None]:
    """Run code of a backend; what a third party's raises becomes an error that names it.

    Raises:
        BitlowerError: the code failed.
    """
    if cls.__module__.startswith("bitlower."):
        yield
        return
    with blamed(f"backend {cls.name!r} failed", source_of(cls)):
        yield


def _written_by(folder: Path) -> str:
    try:
        return str(read_json(folder / FILE)["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = reason(error) if isinstance(error, OSError) else f"its {FILE} is damaged: {error}"
        raise BitlowerError(f"{folder} is not an artifact ({why})", hint="give the folder of a run") from None
