"""How long each kernel of a library takes, seen by TVM's virtual machine around each call."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bitlower.backends.base import RUNS, WARM, KernelTime
from bitlower.backends.tvm_kernels.pins import require_tvm
from bitlower.backends.tvm_kernels.verify.record import Verification

_BUILTIN = "vm.builtin."
"""What the names of the virtual machine's own functions begin with."""


def kernel_times(folder: Path) -> tuple[KernelTime, ...]:
    """What each kernel takes on the inputs of the self-test, the longest first.

    Each call has the few microseconds in it that looking at the time takes. What the virtual machine does by itself is
    left out: it is mostly that.

    Args:
        folder: the artifact's.

    Raises:
        BitlowerError: TVM is not installed, or the library is code for another processor or device.
        CheckError: a file is missing or damaged.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels.library.files import load_library

    recorded, library = Verification.read(folder), load_library(folder)
    batch = recorded.selftest.batch()
    watch = _Watch(library.code.device)
    library.code.watch(watch)
    for _ in range(WARM + RUNS):
        library(**batch)
        watch.end()
    return watch.times()


class _Watch:
    """Called before and after each function of a run; the device has done its work when it looks at the time."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._start = 0.0
        self._run: dict[str, list[float]] = defaultdict(list)
        self._runs: list[dict[str, list[float]]] = []

    def __call__(self, function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
        """Take the time; 0 lets the function run."""
        if before:
            self._start = time.perf_counter()
        elif not symbol.startswith(_BUILTIN):
            self._device.sync()
            self._run[symbol].append(1e6 * (time.perf_counter() - self._start))
        return 0

    def end(self) -> None:
        """A run is over."""
        self._runs.append(dict(self._run))
        self._run.clear()

    def times(self) -> tuple[KernelTime, ...]:
        """The median over the runs that count."""
        runs = self._runs[WARM:]
        times = (
            KernelTime(name, len(calls), statistics.median(sum(run[name]) for run in runs))
            for name, calls in runs[-1].items()
        )
        return tuple(sorted(times, key=lambda time: -time.microseconds))
