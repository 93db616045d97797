"""How many tokens a traced model takes at once, asked of its graph: whatever limits it is found by its effect.

A learned table of positions (whatever comes before its first position, as OPT's two rows and RoBERTa's padding), sines
and cosines in a buffer, a causal mask or ALiBi's slopes for so many keys: beyond their end an index points outside, or
two shapes no longer fit. Both show without the model's arithmetic: shapes are propagated on the ``meta`` device, and
only the small tensors of whole numbers that follow from the inputs, positions among them, are computed. Models that
count positions without an end (rotary, relative, ALiBi as a function of the distance) have the length that their
configuration states, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree

from bitlower.ir import Program, get_tensor
from bitlower.ir.dataflow import EMBEDDING
from bitlower.ir.tokens import BATCH, ENCODER_SEQUENCE, PICTURES, SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

aten = torch.ops.aten
META = torch.device("meta")
SHORT = 32
"""Tokens that any model with a limit takes: the search begins here."""
ENDLESS = 1 << 20
"""A model that takes so many tokens has no limit of its own."""
_KNOWN = 1 << 22
"""Tensors of more entries than this are followed by their shape alone."""
_INDEXED: dict[Any, Callable[..., list[tuple[torch.Tensor, int, torch.Tensor]]]] = {
    aten.index_select.default: lambda table, dim, index: [(table, dim, index)],
    aten.gather.default: lambda table, dim, index: [(table, dim, index)],
    aten.index.Tensor: lambda table, indices: [
        (table, dim, index) for dim, index in enumerate(indices) if index is not None and index.dtype != torch.bool
    ],
    **{target: lambda table, index, *_: [(table, 0, index)] for target in EMBEDDING},
}


def stated_length(config: PreTrainedConfig) -> int | None:
    """What a configuration of transformers says, under the name that all but models of speech answer to."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    return length if isinstance(length, int) and length > 0 else None


def context_length(program: Program, stated: int | None, dim: str = SEQUENCE) -> int | None:
    """The most tokens, earlier and new ones together, that ``program`` takes at once; None: as many as one likes.

    Args:
        program: traced, at level float, with dimensions named as the frontends name them.
        stated: what the model's configuration says, if anything; the graph may allow fewer.
        dim: along which the tokens lie, of :data:`SEQUENCE` and :data:`ENCODER_SEQUENCE`; the other is short.
    """
    longest = stated or ENDLESS
    fits, fails = min(SHORT, longest), longest
    short = {SEQUENCE: fits, ENCODER_SEQUENCE: fits}
    if _takes(program, {**short, dim: longest}):
        return longest if longest != ENDLESS else None
    if not _takes(program, short):
        return stated
    while fits + 1 < fails:
        middle = min(2 * fits, (fits + fails) // 2)
        fits, fails = (middle, fails) if _takes(program, {**short, dim: middle}) else (fits, middle)
    return fits


@torch.no_grad()
def _takes(program: Program, tokens: Mapping[str, int]) -> bool:
    """Whether no index points outside of its table and all shapes fit at so many ``tokens``."""
    sizes = {BATCH: 2, PICTURES: 1, "past": 0, "past + sequence": tokens[SEQUENCE], **tokens}
    examples = []
    for spec in program.inputs:
        if any(isinstance(dim, str) and dim not in sizes for dim in spec.type.shape):
            return True  # it reads something whose sizes have no names
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.type.shape]
        examples.append(_example(spec.name, shape, spec.type.dtype))
    try:
        _Shapes(program.module).run(*examples, enable_io_processing=False)
    except Exception:  # whatever torch raises on what does not fit
        return False
    return True


def _example(name: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """An input of which whole numbers are known: rows of tokens of two kinds, as one of them may mean padding."""
    if dtype.is_floating_point or len(shape) != 2:
        return torch.empty(shape, dtype=dtype, device=META)
    if name == "position_ids":
        return torch.arange(shape[1], dtype=dtype).expand(shape)
    if name in ("input_ids", "decoder_input_ids"):
        return torch.arange(shape[0], dtype=dtype)[:, None].expand(shape)
    return torch.full(shape, int(name.endswith("attention_mask")), dtype=dtype)


class _Shapes(fx.Interpreter):
    """Runs a graph for its shapes; tensors on the CPU are known by value, those on ``meta`` by shape."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensor = get_tensor(self.module, str(target))  # type: ignore[arg-type]
        known = not tensor.is_floating_point() and tensor.numel() <= _KNOWN
        return tensor if known else torch.empty_like(tensor, device=META)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _INDEXED and not kwargs:
            for table, dim, index in _INDEXED[target](*args):
                if index.device != META and index.numel() and not -table.shape[dim] <= int(index.min()):
                    raise IndexError(f"{target}: the index {int(index.min())} is before the table")
                if index.device != META and index.numel() and int(index.max()) >= table.shape[dim]:
                    raise IndexError(f"{target}: the index {int(index.max())} is behind the table")
        shapes = target(*_pytree.tree_map(_to_meta, args), **_pytree.tree_map(_to_meta, kwargs))
        tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in _pytree.tree_leaves(shapes) if isinstance(leaf, torch.Tensor)]
        if all(tensor.device != META for tensor in tensors) and all(r.numel() <= _KNOWN for r in results):
            return target(*args, **kwargs)
        return shapes


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(META)
    return META if isinstance(value, torch.device) else value
