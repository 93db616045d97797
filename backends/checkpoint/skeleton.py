"""The Hugging Face model that a checkpoint is for: its weights' names and shapes, and a way to run it from a file.

The model is built without weights, so it takes next to no memory whatever its size, and is run with each module's
weights brought in just before the module runs and dropped right after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bitlower.backends.checkpoint.experts import pieces_of_experts
from bitlower.ir import Batch, BitlowerError, Program, nearest
from bitlower.ir.experts import unfuse_experts
from bitlower.ir.quiet import quiet
from bitlower.ir.tasks import TASKS, auto_class

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
NORMED = ("parametrizations.weight.original0", "parametrizations.weight.original1")
"""How torch names the lengths and the directions of a weight that is stored as both."""


class Skeleton:
    """A Hugging Face model without weights.

    Args:
        program: its task and configuration say which model.

    Raises:
        BitlowerError: the program is of no Hugging Face model, or transformers cannot build it.
    """

    def __init__(self, program: Program) -> None:
        self._model: Any = _build(program)
        self.pieces = pieces_of_experts(self._model)
        """For each linear layer of an expert the layers, by module path, that hold its rows in files, in order."""
        unfuse_experts(self._model)
        self.loader: Any = _loader(program)
        """The class of transformers that loads a checkpoint of it."""
        self.architecture = type(self._model).__name__
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        """Of all that a checkpoint may hold, by name; tied ones under each of their names."""
        self.ties = self._ties()
        """The names of tied weights, each with the one that checkpoints hold."""
        self.kinds = {path: kind for path, module in self._model.named_modules() if (kind := _kind(module))}
        """``Linear``, ``Conv1D`` or ``Embedding`` by module path."""
        self._read_above = dict(_read_above(program))
        self._attentions = [path for path, m in self._model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        self.experts = [path for path in self.kinds if re.search(r"\.experts\.\d+\.\w+$", path)]
        """The linear layers of experts, which transformers holds in one tensor."""
        self.own = {path: type(m).__name__ for path, m in self._model.named_modules() if _computes_by_itself(m)}
        """Linear layers whose class has a ``forward`` of its own, which reads the weight, by module path: the class."""
        self.initialized = dict(self._initialized())
        """Linear layers whose weight the module around them reads when a model is made, by module path: its class."""
        self.head = self._head()
        """The module path of the output head, empty if there is none."""

    def _initialized(self) -> Iterator[tuple[str, str]]:
        for path, module in self._model.named_modules():
            for name, layer in module.named_children():
                if not isinstance(layer, nn.Linear):
                    continue
                parameters, layer._parameters = layer._parameters, {}
                try:
                    self._model._init_weights(module)
                except AttributeError:  # as where a client holds the layer packed, without a weight
                    yield f"{path}.{name}" if path else name, type(module).__name__
                finally:
                    layer._parameters = parameters

    def attention_around(self, parameter: str) -> str:
        """The ``MultiheadAttention``, by module path, that ``parameter`` is of or lies below; empty if there is none.

        Such a module multiplies with weights of its own, and itself with the weight of the layer in it.
        """
        return next((path for path in self._attentions if parameter.startswith(f"{path}.")), "")

    def names_of(self, parameter: str) -> tuple[str, ...]:
        """Under which names a checkpoint holds a parameter of the Program: its own, or those of its parts; none."""
        parts = tuple(parameter.removesuffix("weight") + part for part in NORMED)
        return next((names for names in ((parameter,), parts) if names[0] in self.shapes), ())

    def _ties(self) -> dict[str, str]:
        first: dict[int, str] = {}
        listed = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        named = sorted(self._model.named_parameters(remove_duplicate=False), key=lambda item: item[0] in listed)
        ties = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        return {name: source for name, source in ties.items() if name != source}

    def _head(self) -> str:
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        return next((path for path, module in self._model.named_modules() if module is head), "")

    def run(
        self, batch: Batch, weight: Callable[[str], torch.Tensor], ties: Mapping[str, str]
    ) -> dict[str, torch.Tensor]:
        """The outputs of the model on ``batch`` by name, without a KV cache.

        Args:
            batch: inputs by name.
            weight: returns a weight by name, float32 and in the model's own orientation.
            ties: names that it does not know, each with the one that it does.
        """
        handles = []
        for path, module in self._model.named_modules():
            names = [name for name, parameter in module._parameters.items() if parameter is not None]
            if names:
                bring = _Bring(module, path, names, weight, ties)
                around = self.attention_around(f"{path}.") or self._read_above.get(path, "")
                runs = self._model.get_submodule(around) if around else module
                handles.append(runs.register_forward_pre_hook(bring.load))
                handles.append(runs.register_forward_hook(bring.drop, always_call=True))
        cache = {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}
        try:
            with torch.no_grad():
                outputs = self._model(**batch, **cache)
        finally:
            for handle in handles:
                handle.remove()
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _read_above(program: Program) -> Iterator[tuple[str, str]]:
    """Layers whose weight the module above reads past them (the time steps of Mamba), each with that module.

    A program without graphs, of an artifact that is only read, says nothing of it.
    """
    for node in (node for graph in program.graphs.values() for node in graph.graph.find_nodes(op="get_attr")):
        layer = str(node.target).rpartition(".")[0]
        above = layer.rpartition(".")[0]
        if above and any(str(user.meta.get("path", "")) == above for user in node.users):
            yield layer, above


class _Bring:
    """Hooks for one module: its weights come before it runs, or what runs with them, and go after."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        names: list[str],
        weight: Callable[[str], torch.Tensor],
        ties: Mapping[str, str],
    ) -> None:
        self._parameters = module._parameters
        self._names = {name: f"{path}.{name}" if path else name for name in names}
        self._weight, self._ties = weight, ties
        self._empty: dict[str, nn.Parameter | None] = {}

    def load(self, module: nn.Module, arguments: Any) -> None:
        for name, full in self._names.items():
            self._empty[name] = self._parameters[name]
            value = self._weight(self._ties.get(full, full))
            self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def drop(self, module: nn.Module, arguments: Any, output: Any) -> None:
        for name, parameter in self._empty.items():
            self._parameters[name] = parameter


def _loader(program: Program) -> Any:
    import transformers

    return getattr(transformers, auto_class(program.task, program.config.get("architectures") or []))


def _build(program: Program) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = program.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise BitlowerError(
            "a checkpoint folder is Hugging Face's, and this program is of no model of theirs",
            hint="export it with the backend `onnx-qdq`",
        )
    if program.task not in TASKS:
        raise BitlowerError(
            f"there is no Hugging Face model for the task {program.task!r}", hint=nearest(program.task, TASKS)
        )
    form = {key: value for key, value in program.config.items() if key not in ("auto_map", "quantization_config")}
    try:
        with quiet(), _without_weights():
            config = CONFIG_MAPPING[kind].from_dict(form)
            model = _loader(program).from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever its libraries raise on a configuration that makes no model
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BitlowerError(f"transformers cannot build the model of this program: {reason}") from None
    built: nn.Module = model.eval()
    return built


def _kind(module: nn.Module) -> str:
    from transformers.pytorch_utils import Conv1D

    kinds = ((nn.Linear, LINEAR), (Conv1D, CONV1D), (nn.Embedding, EMBEDDING))
    return next((name for kind, name in kinds if isinstance(module, kind)), "")


def _computes_by_itself(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let modules that are built meanwhile have parameters without storage; buffers are real, as no file holds them.

    ``torch.device("meta")`` would leave the buffers without storage too. accelerate's ``init_empty_weights`` makes a
    new parameter each time that one is registered, so that tied weights are no longer one.
    """
    handle = register_module_parameter_registration_hook(_without_storage)  # type: ignore[arg-type]  # it may return
    try:
        yield
    finally:
        handle.remove()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    if parameter.device.type == "meta":
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
