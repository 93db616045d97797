"""Modules that are not Hugging Face's: plain ``torch.export``, every dimension of an input that may vary is dynamic."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitlower.frontends._trace import evaluating, explain_failure, to_program
from bitlower.ir import BitlowerError, Program


def trace_module(module: torch.nn.Module, example_inputs: Mapping[str, torch.Tensor], *, task: str) -> Program:
    """Trace ``module`` on ``example_inputs``, given by the names of its ``forward``.

    Raises:
        BitlowerError: an input is no tensor, or the module cannot be traced.
    """
    for name, value in example_inputs.items():
        if not isinstance(value, torch.Tensor):
            raise BitlowerError(f"the example input {name!r} is a {type(value).__name__}", hint="give tensors")
    inputs = {name: value.contiguous().clone() for name, value in example_inputs.items()}
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(value.dim()), auto) for name, value in inputs.items()}
    with evaluating(module), explain_failure(type(module).__name__), torch.no_grad():
        exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    program = to_program(exported, task=task)
    program.source = type(module).__name__
    return program
