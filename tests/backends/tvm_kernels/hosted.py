"""GPU-scheduled kernels without a GPU: the host's part by LLVM, the device functions by whoever launches them.

The host functions are turned to ``llvm`` just before TVM makes their packed interface. They then take CPU tensors,
compute the grid, and call each device function by its name among TVM's global functions, where a launcher waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

DEVICE_KERNEL = 2
"""The calling convention of device functions."""
Launcher = Callable[[list[Any], list[int], list[int]], None]
"""Runs a device function on arguments, with a number of blocks and of threads along x, y and z."""


class HostedKernel:
    """A scheduled PrimFunc as a function of CPU tensors.

    Args:
        function: with thread bindings.
        name: its global symbol.
        target: of the device functions.
        build: from their source to a launcher for each of them.
    """

    def __init__(
        self, function: Any, name: str, target: dict[str, Any], build: Callable[[str], dict[str, Launcher]]
    ) -> None:
        found: dict[str, list[str]] = {}
        with _host_on_cpu(found):
            device = tvm.target.Target(target, host={"kind": "llvm"})
            self.executable = tvm.compile(tvm.IRModule({name: function}), target=device)
        self.name, self.launches = name, list[str]()
        module = self.executable.mod
        launchers = build(module.imports[0].inspect_source())
        module.clear_imports()
        for symbol, launcher in launchers.items():
            tvm_ffi.register_global_func(symbol, self._entry(symbol, launcher, found[symbol]), override=True)

    def _entry(self, symbol: str, launcher: Launcher, axes: list[str]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            given, extents = arguments[: len(arguments) - len(axes)], arguments[len(arguments) - len(axes) :]
            sizes = dict(zip(axes, map(int, extents), strict=True))
            threads, blocks = ([sizes.get(f"{what}.{axis}", 1) for axis in "xyz"] for what in ("threadIdx", "blockIdx"))
            if 0 not in blocks:
                launcher(list(given), blocks, threads)
            self.launches.append(symbol)

        return launch

    def __call__(self, *tensors: Any) -> None:
        self.launches.clear()
        self.executable[self.name](*tensors)


@contextmanager
def _host_on_cpu(found: dict[str, list[str]]) -> Iterator[None]:
    """Within, TVM's pipeline gives host functions the target ``llvm``; ``found`` gets the axes of device functions."""
    original = tirx.transform.MakePackedAPI
    host = tvm.target.Target({"kind": "llvm"}, host={"kind": "llvm"})

    @tvm.transform.module_pass(opt_level=0)
    def retarget(module: Any, _: Any) -> Any:
        changed = {}
        for name, function in module.functions.items():
            if int(function.attrs.get("calling_conv", 0)) == DEVICE_KERNEL:
                axes = [str(axis) for axis in function.attrs["tirx.kernel_launch_params"]]
                found[str(function.attrs["global_symbol"])] = axes
                changed[name] = function
            else:
                changed[name] = function.with_attr("target", host)
        return tvm.IRModule(changed, attrs=module.attrs)

    tirx.transform.MakePackedAPI = lambda: tvm.transform.Sequential([retarget, original()])
    try:
        yield
    finally:
        tirx.transform.MakePackedAPI = original
