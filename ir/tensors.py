"""The tensors of a graph: read, held, hashed; and a graph with the tensors that it uses."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.storage import parts


class UncompiledModule(_LazyGraphModule):
    """A GraphModule whose code is generated when it is first called or read: most copies are edited, not called."""

    def _lazy_forward(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but a wrapper of ``forward`` on the module itself is not entered again."""
        self.real_recompile()
        return type(self).forward(self, *args, **kwargs)

    forward = _lazy_forward


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a copy of the graph and only the tensors that it uses; tensors are shared."""
    graph = fx.Graph()
    val_map: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(module.graph, val_map)
    graph.output(outputs)
    output = module.graph.output_node()
    graph.output_node().meta = dict(output.meta)
    for old, new in val_map.items():
        new.meta = dict(old.meta)
    graph._codegen = module.graph._codegen
    return UncompiledModule(module, graph)


def get_tensor(module: fx.GraphModule, target: str) -> torch.Tensor:
    """The parameter or buffer called ``target`` (dots name submodules).

    Raises:
        BitlowerError: there is none.
    """
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, torch.Tensor):
        raise BitlowerError(f"the program has no tensor {target!r}")
    return value


def set_tensor(module: fx.GraphModule, target: str, tensor: torch.Tensor) -> None:
    """Hold ``tensor`` as ``target``: a parameter if it is one, else a buffer; submodules are made as needed."""
    owner: torch.nn.Module = module
    *parents, leaf = target.split(".")
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def tensor_digest(tensor: torch.Tensor) -> str:
    """A hash of dtype, shape and contents."""
    raw = tensor.detach().cpu().contiguous()
    state = hashlib.sha256(f"{raw.dtype}{list(raw.shape)}".encode())
    for part in parts(raw) if raw.numel() else ():
        state.update(part.view(torch.uint8).numpy().data)
    return state.hexdigest()
