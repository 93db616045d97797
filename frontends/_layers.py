"""Layers that are equal but for their weights: which of them to trace, and the model with these alone.

A decoder of thirty equal layers is traced with three: its first, which may do what no other does, and two more, which
show that a layer is as the one before it. Layers are of one kind if all is equal that says what they compute: the
classes of their modules and what these hold beside weights, the shapes of the weights, and the entries of each list in
the configuration that has one for every layer (full or sliding attention, dense or with experts). What no comparison of
modules can see, such as a model that counts its layers in ``forward``, shows in the trace: the two are not equal there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_COUNT = "num_hidden_layers"
_PLAIN = (bool, int, float, str, type(None))
_ALIKE = 2
"""So many layers of a kind are traced, where there are as many behind the first."""


@dataclass(frozen=True)
class Layers:
    """Which layers of a model are traced, and for which others they stand.

    Args:
        path: of the list of layers, as ``model.layers``.
        traced: the places in it of those that are traced; the first layer comes first.
        stands_for: of each layer of the model, which of ``traced`` it is instantiated from, by its place there.
        kinds: of each layer of the model a number, equal for those of one kind.
    """

    path: str
    traced: tuple[int, ...]
    stands_for: tuple[int, ...]
    kinds: tuple[int, ...]

    def alike(self, first: int, second: int) -> bool:
        """Whether two of the traced layers are of one kind."""
        return self.kinds[self.traced[first]] == self.kinds[self.traced[second]]


def representatives(model: PreTrainedModel) -> Layers | None:
    """The layers to trace; None where they do not repeat, or less than half of the work would be saved."""
    count = getattr(model.config.get_text_config(), _COUNT, None)
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(candidates) != 1 or any(map(is_changed, model.modules())):
        return None
    path, layers = candidates[0]
    kinds = _kinds(model, layers)
    alike = {kind: [i for i, other in enumerate(kinds) if i and other == kind][:_ALIKE] for kind in set(kinds)}
    traced = sorted({0, *(place for places in alike.values() for place in places)})
    if 2 * len(traced) > len(layers):
        return None
    own = {place: order for order, place in enumerate(traced)}
    stands_for = tuple(own[i] if i in own else own[alike[kind][-1]] for i, kind in enumerate(kinds))
    return Layers(path, tuple(traced), stands_for, tuple(kinds.index(kind) for kind in kinds))


def is_changed(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` or hooks of its own, so that its class does not say what it computes."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def shortened(model: PreTrainedModel, layers: Layers) -> Iterator[None]:
    """Let ``model`` have the layers alone that are traced, for a while, numbered anew."""
    parent, _, name = layers.path.rpartition(".")
    owner = model.get_submodule(parent)
    whole = owner.get_submodule(name)
    assert isinstance(whole, nn.ModuleList)
    traced_layers = [whole[place] for place in layers.traced]
    before: list[tuple[Any, str, Any]] = []

    def put(holder: Any, attribute: str, value: Any) -> None:
        present = getattr(holder, attribute)
        setattr(holder, attribute, value)
        before.append((holder, attribute, present))

    try:
        for config in _configurations(model, len(whole)):
            for key, value in _lists(config, len(whole)).items():
                put(config, key, type(value)(value[place] for place in layers.traced))
            put(config, _COUNT, len(traced_layers))
        for part, attribute in _numbers(whole):
            for place, layer in enumerate(traced_layers):
                put(layer.get_submodule(part), attribute, place)
        owner._modules[name] = nn.ModuleList(traced_layers)
        yield
    finally:
        owner._modules[name] = whole
        for holder, attribute, value in reversed(before):
            setattr(holder, attribute, value)


def _kinds(model: PreTrainedModel, layers: nn.ModuleList) -> list[str]:
    """What each layer is, as a text that is equal for equal ones."""
    numbers = _numbers(layers)
    lists = [value for config in _configurations(model, len(layers)) for value in _lists(config, len(layers)).values()]
    return [repr(([value[place] for value in lists], _kind(layer, numbers))) for place, layer in enumerate(layers)]


def _kind(layer: nn.Module, numbers: set[tuple[str, str]]) -> list[Any]:
    form: list[Any] = []
    for name, module in layer.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        form.append((name, type(module).__module__, type(module).__qualname__))
        form.append([(key, t.dtype, tuple(t.shape), t.stride()) for key, t in tensors])
        attributes = {key: value for key, value in vars(module).items() if (name, key) not in numbers}
        form.append([(key, _shown(value)) for key, value in sorted(attributes.items()) if not key.startswith("_")])
    return form


def _shown(value: Any) -> Any:
    """An attribute as a text: a plain value by itself, a function by its name, another object by its class."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [_shown(entry) for entry in value]
    if isinstance(value, dict):
        return [(repr(key), _shown(entry)) for key, entry in value.items()]
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__qualname__)


def _numbers(layers: nn.ModuleList) -> set[tuple[str, str]]:
    """The attributes in which each layer holds its own place, by module and name."""
    attributes: set[tuple[str, str]] | None = None
    for place, layer in enumerate(layers):
        here = {
            (name, key)
            for name, module in layer.named_modules()
            for key, value in vars(module).items()
            if type(value) is int and value == place
        }
        attributes = here if attributes is None else attributes & here
    return attributes or set()


def _configurations(model: PreTrainedModel, count: int) -> list[PreTrainedConfig]:
    """Each configuration that a module holds and that speaks of so many layers."""
    configs = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), _COUNT)]
    distinct = {id(config): config for config in configs}
    return [config for config in distinct.values() if getattr(config, _COUNT) == count]


def _lists(config: PreTrainedConfig, count: int) -> Mapping[str, Any]:
    """What a configuration has for each layer."""
    return {key: v for key, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count}
