"""The Program: a model between passes. It can be run, differentiated, printed, checked, hashed and saved any time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, nearest
from bitlower.ir.fit import Batch, ValueSpec, crop, fit, padded_sizes
from bitlower.ir.scheme import QuantSpec
from bitlower.ir.storage import parts, release
from bitlower.ir.types import Length, Level

if TYPE_CHECKING:
    from bitlower.ir.learnable import RangeSettings
    from bitlower.ir.trainable import TrainableModule


@dataclass(frozen=True)
class Quantizer:
    """What a ``fake_quantize``, ``quantize`` or ``dequantize`` node stands for; it lies in ``node.meta["quantizer"]``.

    Kernels have several, by operand, in ``node.meta["quantizers"]``.

    Args:
        role: one of :data:`~bitlower.ir.scheme.WEIGHT_ROLES` or :data:`~bitlower.ir.scheme.ACTIVATION_ROLES`.
        spec: grid and granularity.
        tensor: the quantized tensor: a parameter's name, or that of the node whose value it is.
    """

    role: str
    spec: QuantSpec
    tensor: str


@dataclass
class Program:
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
        given = self.complete(inputs)
        for name in names:
            if name not in given:
                raise BitlowerError(f"the input {name!r} is missing", hint=f"the model takes {', '.join(names)}")
        return [given[name] for name in names]

    def complete(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """``inputs`` as :meth:`fitted`; each input with a dimension ``past`` that is not among them is empty.

        Raises:
            BitlowerError: an input has a size that the model does not take.
        """
        batch = next((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), 1)
        sizes = {"batch": batch, "past": 0}
        empty = {
            spec.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.type.shape])
            for spec in self.inputs
            if "past" in spec.type.shape and spec.name not in inputs
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

    def clone(self) -> Program:
        """A copy whose graphs can be edited; tensors are shared."""
        return Program(
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

    def digest(self) -> str:
        """A hash of all that the program is: graphs, tensors, types, configuration, files."""
        from bitlower.ir.serialize import encode

        document, tensors = encode(self)
        state = hashlib.sha256(document.encode())
        for name, tensor in sorted(tensors.items()):
            state.update(name.encode())
            state.update(tensor_digest(tensor).encode())
        return state.hexdigest()

    def trainable_module(self, settings: RangeSettings | None = None, taps: Collection[str] = ()) -> TrainableModule:
        """A module to train in a loop or a Trainer of your own; :meth:`load_trained` takes its state.

        Args:
            settings: how the ranges of quantizers behave; learned by default.
            taps: names of nodes whose values are given out too.

        Raises:
            BitlowerError: the program is lowered already, or a quantizer is not calibrated.
        """
        from bitlower.ir.trainable import TrainableModule

        return TrainableModule(self, settings, taps)

    def load_trained(self, state: Mapping[str, torch.Tensor]) -> Program:
        """A copy with the weights and ranges of ``state``, the ``state_dict`` of a :meth:`trainable_module`.

        Raises:
            BitlowerError: the state is that of another program.
        """
        from bitlower.ir.trainable import restored, write_trained

        trained = self.clone()
        write_trained(trained, restored(self, state))
        trained.recompile()
        return trained

    def __str__(self) -> str:
        from bitlower.ir.text import format_program

        return format_program(self)


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
    return fx.GraphModule(module, graph)


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
