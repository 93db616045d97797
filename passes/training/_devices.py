"""Where a training runs: in this process on the CPU, or on the devices and in the processes of `accelerate`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import fx, nn

from bitlower.ir import Batch, BitlowerError

Where = Literal["cpu", "accelerate"]


class Devices:
    """One process on the CPU."""

    device = torch.device("cpu")
    processes = 1
    rank = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """In what precision products are computed."""
        return nullcontext()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the mean of those of all processes."""

    def batch(self, batch: Batch) -> Batch:
        """A batch where the model is."""
        return batch if self.device.type == "cpu" else {name: value.to(self.device) for name, value in batch.items()}


class Accelerated(Devices):
    """What `accelerate launch` has set up: a device, a number of processes, mixed precision.

    Raises:
        BitlowerError: `accelerate` is not installed.
    """

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError:
            raise BitlowerError(
                "training on other devices needs the package accelerate", hint="pip install 'bitlower[train]'"
            ) from None
        self._accelerator = Accelerator()
        self.device = self._accelerator.device
        self.processes, self.rank = self._accelerator.num_processes, self._accelerator.process_index

    def autocast(self) -> AbstractContextManager[Any]:
        """As accelerate was configured; quantizers compute in float32 all the same."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Over all processes, in their order."""
        if self.processes > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")


def make_devices(where: Where) -> Devices:
    """What a pass asks for by name.

    Raises:
        BitlowerError: `accelerate` is not installed.
    """
    return Accelerated() if where == "accelerate" else Devices()


def move(module: fx.GraphModule, device: torch.device) -> None:
    """Put a graph's tensors on ``device``, and let the nodes that make tensors make them there."""
    module.to(device)
    for node in module.graph.nodes:
        node.args = tuple(device if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {
            name: device if isinstance(value, torch.device) else value for name, value in node.kwargs.items()
        }
    module.recompile()
