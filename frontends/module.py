"""Modules that are not Hugging Face's: plain ``torch.export``, every dimension of an input that may vary is dynamic."""

from __future__ import annotations

import keyword
from collections.abc import Mapping

import torch
from torch import fx

from bitlower.frontends._failure import explain_failure
from bitlower.frontends._precision import in_float32
from bitlower.frontends._trace import evaluating, to_program
from bitlower.ir import BitlowerError, Program

_OWN = ("graph", "meta")
"""Names of a torch.fx module that its class does not show."""


def trace_module(module: torch.nn.Module, example_inputs: Mapping[str, torch.Tensor], *, task: str) -> Program:
    """Trace ``module`` on ``example_inputs``, given by the names of its ``forward``.

    Raises:
        BitlowerError: an input is no tensor, or the module cannot be traced.
    """
    _check_names(module)
    for name, value in example_inputs.items():
        if not isinstance(value, torch.Tensor):
            raise BitlowerError(f"the example input {name!r} is a {type(value).__name__}", hint="give tensors")
    module, note = in_float32(module)
    inputs = {name: _plain(value) for name, value in example_inputs.items()}
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(value.dim()), auto) for name, value in inputs.items()}
    with evaluating(module), explain_failure(type(module).__name__), torch.no_grad():
        exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    program = to_program(exported, task=task)
    program.source = type(module).__name__
    program.notes = note
    return program


def _check_names(module: torch.nn.Module) -> None:
    """See that a graph can hold all parts of the module under their own names.

    Raises:
        BitlowerError: one is called as something of a graph's own, which would hide it, or as no text form takes.
    """
    for name in (*module._modules, *module._parameters, *module._buffers):
        if hasattr(fx.GraphModule, name) or name in _OWN:
            raise BitlowerError(
                f"{type(module).__name__} has a part called {name!r}, a name that torch's graphs have for themselves",
                hint="call it otherwise",
            )
    for path, _ in (*module.named_modules(), *module.named_parameters(), *module.named_buffers()):
        if any(keyword.iskeyword(part) for part in path.split(".")) or set(path) & set(" \t\n\"'\\"):
            raise BitlowerError(
                f"{type(module).__name__} has a part called {path!r}, which no graph can name",
                hint="call it otherwise",
            )


def _plain(value: torch.Tensor) -> torch.Tensor:
    value = value.float() if value.is_floating_point() else value
    return value.detach().contiguous().clone()
