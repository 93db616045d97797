from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import fx

from bitlower.ir import Level, Program, TensorType, ValueSpec
from bitlower.ir.serialize import decode, encode

ACTIVATION, LOGITS = TensorType(torch.float32, ("batch", 16)), TensorType(torch.float32, ("batch", 4))


class TinyModel(torch.nn.Module):
    """A residual block of two linears and a LayerNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return hidden, self.head(hidden)


@pytest.fixture
def tiny_program() -> Program:
    """Float program, input ``x``: [batch, 16], outputs ``hidden``: [batch, 16] and ``logits``: [batch, 4]."""
    document, tensors = encode(_traced())
    return decode(document, {name: tensor.clone() for name, tensor in tensors.items()})


@cache
def _traced() -> Program:
    torch.manual_seed(0)
    example = {"x": torch.randn(3, 16)}
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(TinyModel().eval(), (), example, dynamic_shapes=dynamic, strict=False)
    module = exported.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
        elif node.op != "output":
            node.meta = _meta(node)
    module.graph.output_node().meta = {}
    module.graph.set_codegen(fx.graph.CodeGen())
    plain = fx.GraphModule(module, module.graph)
    outputs = (ValueSpec("hidden", ACTIVATION), ValueSpec("logits", LOGITS))
    program = Program({"model": plain}, Level.FLOAT, "text-classification", (ValueSpec("x", ACTIVATION),), outputs)
    program.recompile()
    return program


def _meta(node: fx.Node) -> dict[str, object]:
    """What the program's nodes carry: the type with its symbolic batch by name, and the module path."""
    value = node.meta["val"] if "val" in node.meta else node.graph.owning_module.get_parameter(node.target)
    shape = tuple(size if isinstance(size, int) else "batch" for size in value.shape)
    meta: dict[str, object] = {"type": TensorType(value.dtype, shape)}
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    if path:
        meta["path"] = path
    if node.op == "call_function":
        meta["source"] = f"tiny.py: {node.name}"
    return meta
