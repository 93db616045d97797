"""Backends by name: the folder ``backends/onnx_qdq`` is called ``onnx-qdq``.

A backend's module offers ``Options`` (a dataclass of what it can be told), ``export(program, folder, batches=…,
provenance=…, **options)`` and ``verify(folder)``; both give a report that has ``to_dict`` or is a dataclass. It may
offer ``supports(spec, shape, role, **options)``, which gives the reason why a tensor cannot be held, or nothing;
``check_level(level)``, which raises where it takes no program at that level; ``check_program(program, **options)``,
which raises where it cannot express an operator; and ``check_host(**options)``, which raises where this machine lacks
what it needs.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bitlower.backends
from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program, nearest
from bitlower.ir.dataflow import operand
from bitlower.ir.files import check_name, reason
from bitlower.ir.json_files import read_json


def known_backends() -> list[str]:
    """The names of all backends; imports none. A folder without a module ``_export`` writes no artefact and is none."""
    folders = [Path(path) for path in bitlower.backends.__path__]
    found = {module.name for module in pkgutil.iter_modules(map(str, folders)) if not module.name.startswith("_")}
    exports = {name for name in found if any((folder / name / "_export.py").is_file() for folder in folders)}
    return sorted(name.replace("_", "-") for name in exports)


def check_export(name: str, options: Mapping[str, Any]) -> None:
    """See that the backend is there and takes ``options``, before any work.

    Raises:
        BitlowerError: an unknown backend or option (the nearest match is named), or a value that does not fit.
    """
    if name not in known_backends():
        raise BitlowerError(f"unknown backend {name!r}", hint=nearest(name, known_backends()))
    module = _module(name)
    known = [option.name.replace("_", "-") for option in dataclasses.fields(module.Options)]
    for option in options:
        if option.replace("_", "-") not in known:
            raise BitlowerError(f"backend {name!r} has no option {option!r}", hint=nearest(option, known))
    try:
        module.Options(**_keywords(options))
    except BitlowerError as error:
        raise BitlowerError(f"backend {name!r}: {error.message}", hint=error.hint) from None


def check_level(name: str, level: Level) -> None:
    """See that the backend takes programs at ``level``.

    Raises:
        BitlowerError: it does not; the hint says what to do about it.
    """
    check = getattr(_module(name), "check_level", None)
    if check is None:
        return
    try:
        check(level)
    except BitlowerError as error:
        raise BitlowerError(f"backend {name!r}: {error.message}", hint=error.hint) from None


def check_host(name: str, options: Mapping[str, Any]) -> None:
    """See that this machine has what the backend needs.

    Raises:
        BitlowerError: a package, a tool or the right processor is missing; the hint says what to do about it.
    """
    check = getattr(_module(name), "check_host", None)
    if check is not None:
        check(**_keywords(options))


def takes(name: str, level: Level) -> bool:
    """Whether the backend takes programs at ``level``."""
    try:
        check_level(name, level)
    except BitlowerError:
        return False
    return True


def export(
    name: str,
    program: Program,
    folder: Path,
    batches: Sequence[Batch],
    options: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the artefact of ``program`` into ``folder`` and give the backend's report as plain data.

    ``provenance`` goes into the manifest: the seed and what was calibrated on.

    Raises:
        BitlowerError: the backend cannot express the program.
        CheckError: what was written does not compute what the program does.
    """
    write = _module(name).export
    return plain_report(write(program, folder, batches=batches, provenance=provenance, **_keywords(options)))


def check_program(name: str, program: Program, options: Mapping[str, Any]) -> None:
    """See that the backend can express every operator, and hold every tensor that has a quantizer, open or closed.

    Raises:
        BitlowerError: it cannot; the operator or the tensor is named.
    """
    check, supports = (getattr(_module(name), what, None) for what in ("check_program", "supports"))
    if check is not None:
        check(program, **_keywords(options))
    if supports is None:
        return
    for node, quantizer in program.quantizers():
        shape = operand(node, 0).meta["type"].shape
        if reason := supports(quantizer.spec, shape, quantizer.role, **_keywords(options)):
            raise BitlowerError(
                f"{name} cannot hold {quantizer.tensor} ({quantizer.role}) as {quantizer.spec}: {reason}",
                hint="choose another scheme or format, or leave it in float with `ignore`",
            )


def verify_artefact(folder: Path) -> dict[str, Any]:
    """Check an artefact with the backend that wrote it, and give its report as plain data.

    Raises:
        BitlowerError: not an artefact.
        CheckError: a file is missing or changed, or the model does not compute what it did.
    """
    path = check_name(folder) / "manifest.json"
    try:
        manifest = read_json(path)
        name = str(manifest["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = reason(error) if isinstance(error, OSError) else f"its manifest.json is damaged: {error}"
        raise BitlowerError(f"{folder} is not an artefact ({why})", hint="give the folder of a run") from None
    if name not in known_backends():
        raise BitlowerError(f"{path} names the unknown backend {name!r}", hint=nearest(name, known_backends()))
    try:
        return plain_report(_module(name).verify(folder))
    except BitlowerError:
        raise
    except Exception as error:  # what is damaged makes the runtimes raise many kinds
        line = next(iter(str(error).splitlines()), "")
        raise CheckError(f"{folder} is damaged: {type(error).__name__}: {line}") from error


def plain_report(report: Any) -> dict[str, Any]:
    """A backend's report, a dataclass or a mapping, as plain data."""
    if hasattr(report, "to_dict"):
        return dict(report.to_dict())
    return dataclasses.asdict(report) if dataclasses.is_dataclass(report) else dict(report)  # type: ignore[arg-type]


def _keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in options.items()}


def _module(name: str) -> Any:
    return importlib.import_module(f"bitlower.backends.{name.replace('-', '_')}")
