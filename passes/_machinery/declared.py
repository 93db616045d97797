"""What a pass declares about itself (levels, contract, what it preserves), and whether that means anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitlower.ir import BitlowerError, Level, Program
from bitlower.ir.diagnostics import shorten
from bitlower.ir.plugins.faults import blamed, source_of
from bitlower.passes._machinery.base import Contract, Pass
from bitlower.passes._machinery.faults import pass_name

_DECLARED = ("name", "requires", "ensures", "contract", "preserves")


def declaration_problem(declared: Pass | type[Pass]) -> tuple[str, str] | None:
    """What is wrong with what a pass, or a class of passes, declares, and the fix."""
    if not isinstance(declared.contract, Contract):
        return f"has the contract {declared.contract!r}", "set it to one of Contract.ANALYSIS, EXACT, LOSSY"
    if not _is_set_of(declared.requires, Level) or not isinstance(declared.ensures, Level | None):
        return "has no proper levels", "`requires` is a frozenset of Level, `ensures` a Level or None"
    if not declared.requires:
        return "takes no level", "`requires` names one or more"
    if not _is_set_of(declared.preserves, type):
        return f"preserves {declared.preserves!r}", "`preserves` is a frozenset of types of results"
    return None


def check_declared(pass_: Pass) -> None:
    """Hold a pass, which may have set what its class declares, to meaning.

    Raises:
        BitlowerError: it is no pass, or declares nonsense.
    """
    if not isinstance(pass_, Pass):
        raise BitlowerError(f"{type(pass_).__name__} is no pass", hint="derive from bitlower.Pass")
    named = isinstance(pass_.name, str) and pass_.name == type(pass_).name and bool(pass_.name)
    problem = declaration_problem(pass_) if named else ("has lost its name", "`name` belongs to the class")
    if problem:
        raise BitlowerError(f"the pass {pass_name(pass_)!r} {problem[0]}", hint=problem[1])


def declared(pass_: Pass) -> dict[str, Any]:
    """All that ``pass_`` declares, by name."""
    return {name: getattr(pass_, name) for name in _DECLARED}


def data_runs(pass_: Pass, program: Program) -> int:
    """How often ``pass_`` says that it runs ``program`` over all calibration data.

    Raises:
        BitlowerError: it cannot say, or says nonsense.
    """
    return _count(pass_, "how often it runs over the data", "number of runs", lambda: pass_.data_runs(program))


def training_steps(pass_: Pass, batches: int) -> int:
    """How many of ``batches``, over and over, ``pass_`` says that it trains on.

    Raises:
        BitlowerError: it cannot say, or says nonsense.
    """
    return _count(pass_, "how long it trains", "number of steps", lambda: pass_.training_steps(batches))


def training_evaluations(pass_: Pass, batches: int) -> int:
    """How often ``pass_`` says that it evaluates the held-out data while it trains on ``batches``.

    Raises:
        BitlowerError: it cannot say, or says nonsense.
    """
    asked = "how often it evaluates"
    return _count(pass_, asked, "number of evaluations", lambda: pass_.training_evaluations(batches))


def trains(pass_: Pass) -> bool:
    """Whether ``pass_`` says that it trains on data.

    Raises:
        BitlowerError: it cannot say, or says nonsense.
    """
    return _truth(pass_, "whether it trains", pass_.trains)


def needs_calibration(pass_: Pass) -> bool:
    """Whether ``pass_`` says that it cannot do without calibration data.

    Raises:
        BitlowerError: it cannot say, or says nonsense.
    """
    return _truth(pass_, "whether it needs calibration data", pass_.needs_calibration)


def _truth(pass_: Pass, asked: str, method: Callable[[], object]) -> bool:
    what, answer = _asked(pass_, asked, method)
    if not isinstance(answer, bool):
        raise BitlowerError(f"{what}: {shorten(repr(answer))} is neither True nor False")
    return answer


def _count(pass_: Pass, asked: str, unit: str, method: Callable[[], object]) -> int:
    what, count = _asked(pass_, asked, method)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise BitlowerError(f"{what}: {shorten(repr(count))} is no {unit}")
    return count


def _asked(pass_: Pass, asked: str, method: Callable[[], object]) -> tuple[str, object]:
    """The beginning of messages about an answer of ``pass_``, and the answer."""
    what = f"pass {pass_name(pass_)!r} cannot say {asked}"
    with blamed(what, source_of(type(pass_))):
        return what, method()


def _is_set_of(value: object, kind: type) -> bool:
    return isinstance(value, set | frozenset) and all(isinstance(item, kind) for item in value)
