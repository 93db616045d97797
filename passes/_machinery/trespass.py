"""What a third party's pass must not leave behind in the process: replaced functions, and threads that run on."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from bitlower.ir import CheckError

_PATIENCE = 1.0
"""Seconds that a thread has to end after the pass."""


class TrespassGuard:
    """Holds the pass that runs in its block to what was there before.

    Python's own functions and bitlower's, which all passes call, are put back.

    Args:
        name: of the pass.

    Raises:
        CheckError: at the end of the block, if that did not fail: the pass replaced a function, or a thread of its own
            still runs and would keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._functions = [(owner, dict(_functions(owner))) for owner in _owners()]
        self._threads = set(threading.enumerate())

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        name = self._name
        replaced = [label for owner, functions in self._functions for label in _put_back(owner, functions)]
        if kind is not None:
            return
        if replaced:
            raise CheckError(
                f"the pass {name!r} replaced {replaced[0]}", hint="what all passes call stays as it is: call your own"
            )
        for thread in set(threading.enumerate()) - self._threads:
            if not thread.daemon:
                thread.join(_PATIENCE)
            if thread.is_alive() and not thread.daemon:
                raise CheckError(
                    f"the pass {name!r} left the thread {thread.name!r} running", hint="join it before `run` returns"
                )


def _owners() -> Iterator[Any]:
    """Modules and classes whose functions are looked after."""
    yield builtins
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "bitlower" and isinstance(module, ModuleType):
            yield module
            yield from (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)


def _functions(owner: Any) -> Iterator[tuple[str, Any]]:
    """The functions that ``owner`` defines, and the classes if it is a module."""
    for name, value in list(vars(owner).items()):
        if callable(value) or isinstance(value, staticmethod | classmethod | property | FunctionType):
            yield name, value


def _put_back(owner: Any, functions: dict[str, Any]) -> Iterator[str]:
    """The names of functions that are others now, or that hide inherited ones, which are put back."""
    now = vars(owner)
    added = [name for name, _ in _functions(owner) if name not in functions] if isinstance(owner, type) else []
    for name in added:
        delattr(owner, name)
        yield f"{owner.__module__}.{owner.__name__}.{name}"
    for name, value in functions.items():
        if now.get(name) is not value:
            setattr(owner, name, value)
            yield f"{getattr(owner, '__module__', '') or ''}.{owner.__name__}.{name}".lstrip(".")
