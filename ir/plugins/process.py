"""What of the process a pass may change, and gets put back after it: streams, folder, torch's and numpy's settings.

A pass that leaves such a thing changed would change what comes after it, and what comes out would depend on whether
the pass ran or its result was in the cache.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

import numpy as np
import torch
from torch.nn.modules import module as module_hooks

_SIGNALS = [s for s in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")) if s is not None]
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (lambda: torch.get_default_device().type, lambda kind: torch.set_default_device(None if kind == "cpu" else kind)),
    (np.geterr, lambda states: np.seterr(**states)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
)
"""Ways to read a setting, and to set what was read."""


@contextmanager
def kept_process() -> Iterator[None]:
    """Put back, at the end of the block, what foreign code in it changed of the process.

    Standard output and error (closed, replaced, or their descriptors redirected), the working directory, the
    environment, settings and random state of torch, numpy and Python, torch's global hooks, and the handlers of the
    signals that end a process.
    """
    with ExitStack() as stack:
        for keep in (_kept_descriptors, _kept_streams, _kept_folder, _kept_environment, _kept_signals, _kept_hooks):
            stack.enter_context(keep())
        settings = [(read(), read, write) for read, write in _SETTINGS]
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            for value, read, write in settings:
                if read() != value:
                    write(value)
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])


class _Lent(io.TextIOBase):
    """A stream for foreign code, which writes on to ``stream`` and cannot close it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def close(self) -> None:
        """Not even at the end of this object's life."""


@contextmanager
def _kept_streams() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lent(stream) if stream is not None else stream for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


@contextmanager
def _kept_descriptors() -> Iterator[None]:
    """Standard input, output and error as the system knows them."""
    copies = {}
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            copies[descriptor] = os.dup(descriptor)
    try:
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)


@contextmanager
def _kept_folder() -> Iterator[None]:
    """The working directory, if it is still there."""
    try:
        folder = os.getcwd()
    except OSError:
        folder = ""
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(folder)


@contextmanager
def _kept_environment() -> Iterator[None]:
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)


@contextmanager
def _kept_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _kept_hooks() -> Iterator[None]:
    """The hooks that torch calls for every module."""
    tables = [v for k, v in vars(module_hooks).items() if k.startswith("_global_") and isinstance(v, dict)]
    copies = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, copies, strict=True):
            if dict(table) != before:
                table.clear()
                table.update(before)
