"""GPU-scheduled kernels without a GPU: the host's part by LLVM, the device functions by whoever launches them.

The host functions are turned to ``llvm`` just before TVM makes their packed interface. They then take CPU tensors,
compute the grid, and call each device function by its name among TVM's global functions, where a launcher waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

DEVICE_KERNEL = 2
"""The calling convention of device functions."""
Launcher = Callable[[list[Any], list[int], list[int]], None]
"""Runs a device function on arguments, with a number of blocks and of threads along x, y and z."""


class Hosted:
    """Code for a GPU that runs on CPU tensors.

    Args:
        compile: gives an executable, with device functions beside the host's code.
        build: from their source to a launcher for each of them.
    """

    _running: Hosted

    def __init__(self, compile: Callable[[], Any], build: Callable[[str], dict[str, Launcher]]) -> None:
        self._axes: dict[str, list[str]] = {}
        with _host_on_cpu(self._axes):
            self.executable = compile()
        self.launches = list[str]()
        host = self.executable.mod
        while host.imports and host.imports[0].kind not in ("cuda", "opencl"):
            host = host.imports[0]
        self._launchers = build(host.imports[0].inspect_source())
        host.clear_imports()
        for symbol in self._launchers:
            tvm_ffi.register_global_func(symbol, partial(_launch, symbol), override=True)

    def run(self, function: Callable[[], Any]) -> Any:
        """What ``function`` gives, in which device functions are those of this code; they are noted in ``launches``."""
        self.launches.clear()
        Hosted._running = self
        return function()

    def launch(self, symbol: str, arguments: Sequence[Any]) -> None:
        """Run a device function; a GPU takes no empty grid."""
        axes = self._axes[symbol]
        given, extents = arguments[: len(arguments) - len(axes)], arguments[len(arguments) - len(axes) :]
        sizes = dict(zip(axes, map(int, extents), strict=True))
        threads, blocks = ([sizes.get(f"{what}.{axis}", 1) for axis in "xyz"] for what in ("threadIdx", "blockIdx"))
        assert 0 not in blocks, f"{symbol} is launched on an empty grid"
        self._launchers[symbol](list(given), blocks, threads)
        self.launches.append(symbol)


def _launch(symbol: str, *arguments: Any) -> None:
    """The global function of a symbol: equal names in several codes are told apart by which of them runs."""
    Hosted._running.launch(symbol, arguments)


class HostedKernel(Hosted):
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
        device = tvm.target.Target(target, host={"kind": "llvm"})
        super().__init__(lambda: tvm.compile(tvm.IRModule({name: function}), target=device), build)
        self.name = name

    def __call__(self, *tensors: Any) -> None:
        self.run(lambda: self.executable[self.name](*tensors))


class HostedLibrary(Hosted):
    """A Program compiled for a GPU, called as the Program is, on the CPU.

    Args:
        program: at level fused.
        target: a GPU.
        build: from the source of the device functions to a launcher for each of them.
        activations: float16, float32, or what the target has by itself.
    """

    def __init__(
        self, program: Any, target: Any, build: Callable[[str], dict[str, Launcher]], activations: str = "auto"
    ) -> None:
        from bitlower.backends.tvm_kernels import Target
        from bitlower.backends.tvm_kernels.library.compile import compile_program

        def compile() -> Any:
            library = compile_program(program, target, activations=activations)
            self.library = replace(library, code=replace(library.code, target=Target.LLVM))
            return library.code.executable

        super().__init__(compile, build)

    def __call__(self, **inputs: Any) -> Any:
        return self.run(lambda: self.library(**inputs))


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
