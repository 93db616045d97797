"""Under which names a checkpoint holds the experts of a mixture, one tensor in transformers: each expert by itself.

transformers says how it merges what lies in the files: ``experts.*.gate_proj.weight`` and ``experts.*.up_proj.weight``
become ``experts.gate_up_proj``, expert by expert, the rows of one below those of the other.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def pieces_of_experts(model: nn.Module) -> dict[str, list[str]]:
    """By path of an expert's linear layer (``experts.3.gate_up_proj``) the paths of the layers that hold its rows.

    Experts that lie in the files as they do in transformers, in one tensor, are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    pieces = {}
    for path, module in model.named_modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if isinstance(module._parameters.get(name), nn.Parameter) and hasattr(module, "_apply_gate"):
                leaves = _leaves(converters, f"{path}.{name}")
                for expert in range(module.num_experts if leaves else 0):
                    pieces[f"{path}.{expert}.{name}"] = [f"{path}.{expert}.{leaf}" for leaf in leaves]
    return pieces


def _leaves(converters: list[Any], fused: str) -> list[str]:
    """The names of an expert's layers in the files, whose rows make those of the tensor ``fused``."""
    for converter in converters:
        [target, *others] = converter._original_target_patterns
        operations = [type(operation).__name__ for operation in converter.operations]
        sources = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in converter._original_source_patterns]
        merged = operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        if fused.endswith(target.rstrip("$")) and not others and merged and all(sources):
            return [source[1] for source in sources if source]
    return []
