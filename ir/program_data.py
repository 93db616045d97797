"""A Program without its text form, its hash and its training: what those are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, nearest
from bitlower.ir.fit import Batch, ValueSpec, crop, fit, padded_sizes
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.storage import release
from bitlower.ir.tensors import copy_module, get_tensor
from bitlower.ir.tokens import BATCH, ENCODER_PAST, PAST, is_past
from bitlower.ir.types import Length, Level


@dataclass
class ProgramData:
    """A model as named graphs at one level.

    Each graph is a ``torch.fx.GraphModule`` of pre-decomposition ATen operators that takes the inputs by name and
    returns a tuple in the order of ``outputs``. Each of its nodes that is not ``output`` carries in ``meta``:
    ``type`` (:class:`TensorType`, absent for values that are no tensors), ``path`` (the model's own module path),
    ``source`` (the line of the model that traced it), ``quantizer`` (:class:`Quantizer`) on quantizer nodes, and
    ``quantizers`` (several, by operand) on kernels.

    Args:
        graphs: by name; an encoder or a decoder alone is ``{"model": …}``.
        level: how far it is lowered.
        task: ``feature-extraction``, ``text-classification``, …
        inputs: of the graph ``model``.
        outputs: of the graph ``model``.
        config: the model's Hugging Face configuration, empty for other modules.
        assets: files that belong to the model (tokenizer), by name.
        source: where it came from, as the user wrote it.
        passes: the passes that ran, as pipeline text.
        transposed: the parameters, as ``graph/name``, that lie the other way round than in the model's own files.
        context_length: the most tokens, earlier and new ones together, that it takes at once; None: no limit is known.
        lengths: which sizes the symbolic dimensions of inputs may have, by name; any where nothing is said.
        notes: what the frontend did that the user should know, a line each; neither saved nor part of the digest.
    """

    graphs: dict[str, fx.GraphModule]
    level: Level
    task: str
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    config: dict[str, Any] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)
    source: str = ""
    passes: list[str] = field(default_factory=list)
    transposed: tuple[str, ...] = ()
    context_length: int | None = None
    lengths: dict[str, Length] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> fx.GraphModule:
        """The graph ``model``."""
        return self.graphs["model"]

    @property
    def graph(self) -> fx.Graph:
        """The nodes of the graph ``model``."""
        return self.module.graph

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model: inputs by name, outputs by name, cut to what was given where inputs had to be padded.

        Raises:
            BitlowerError: an input is missing or unknown, or has a size that the model does not take.
        """
        results = self.module(*self.arguments(inputs))
        return self.cropped({spec.name: value for spec, value in zip(self.outputs, results, strict=True)}, inputs)

    def arguments(self, inputs: Batch) -> list[torch.Tensor]:
        """``inputs`` in the order of the graph's placeholders, as :meth:`fitted`; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown, or has a size that the model does not take.
        """
        names = [spec.name for spec in self.inputs]
        for name in inputs:
            if name not in names:
                raise BitlowerError(f"the model has no input {name!r}", hint=nearest(name, names))
        values = self.complete(inputs)
        for name in names:
            if name not in values:
                raise BitlowerError(f"the input {name!r} is missing", hint=f"the model takes {', '.join(names)}")
        return [values[name] for name in names]

    def complete(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """``inputs`` as :meth:`fitted`; what earlier tokens left (:func:`is_past`) is empty or zero if not among them.

        Raises:
            BitlowerError: an input has a size that the model does not take.
        """
        batch = next((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), 1)
        sizes = {BATCH: batch, PAST: 0, ENCODER_PAST: 0}
        empty = {
            spec.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.type.shape])
            for spec in self.inputs
            if is_past(spec) and spec.name not in inputs
        }
        return {**self.fitted(inputs), **empty}

    def fitted(self, inputs: Batch) -> Batch:
        """``inputs`` in the types and sizes that the model takes; themselves if they are.

        Numbers of another width are cast. A dimension in :attr:`lengths` is padded at its end: with the padding token
        in ``input_ids``, with zeros elsewhere, so that a mask says that nothing is there.

        Raises:
            BitlowerError: a dimension is longer than the model takes.
        """
        return fit(inputs, self.inputs, self.lengths, self.config.get("pad_token_id"))

    def cropped(self, results: dict[str, torch.Tensor], inputs: Batch) -> dict[str, torch.Tensor]:
        """``results`` of the model on ``inputs`` without what stands where :meth:`fitted` had padded."""
        return crop(results, self.outputs, padded_sizes(inputs, self.inputs, self.lengths))

    def clone(self) -> Self:
        """A copy whose graphs can be edited; tensors are shared."""
        return type(self)(
            {name: copy_module(module) for name, module in self.graphs.items()},
            self.level,
            self.task,
            self.inputs,
            self.outputs,
            dict(self.config),
            dict(self.assets),
            self.source,
            list(self.passes),
            self.transposed,
            self.context_length,
            dict(self.lengths),
            self.notes,
        )

    def recompile(self) -> None:
        """Make the graphs' edits take effect: drop dead nodes and unused tensors, then generate the code anew."""
        for name, module in self.graphs.items():
            module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
            self.graphs[name] = copy_module(module)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer that a graph uses, once, by ``graph/name``."""
        for graph_name, module in self.graphs.items():
            for target in sorted({node.target for node in module.graph.nodes if node.op == "get_attr"}):
                yield f"{graph_name}/{target}", get_tensor(module, target)

    def quantizers(self) -> Iterator[tuple[fx.Node, Quantizer]]:
        """Every node that rounds or dequantizes, with what it stands for; a kernel with what none before it has."""
        for module in self.graphs.values():
            seen: set[Quantizer] = set()
            for node in module.graph.nodes:
                if "quantizer" in node.meta:
                    yield node, node.meta["quantizer"]
                for quantizer in node.meta.get("quantizers", {}).values():
                    if quantizer not in seen:
                        seen.add(quantizer)
                        yield node, quantizer

    def size_bytes(self) -> int:
        """Bytes of all tensors, each storage once, at the width they are held in."""
        seen = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for _, t in self.tensors()}
        return sum(seen.values())

    def release(self) -> None:
        """Give back the memory of tensors that lie in files, see :mod:`bitlower.ir.storage`."""
        for _, tensor in self.tensors():
            release(tensor)
