"""GPTQModel's format ``gptq_v2``: AutoGPTQ's layout, with zero points stored as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bitlower.backends.checkpoint.container import Entry, Tensors
from bitlower.backends.checkpoint.contents import Layer, unpacked_linears
from bitlower.backends.checkpoint.format import (
    Format,
    Packed,
    Weight,
    cast,
    how_packed,
    pack_codes,
    packed_paths,
    words,
)
from bitlower.backends.checkpoint.skeleton import EMBEDDING, Skeleton
from bitlower.ir import BitlowerError, CheckError, packing
from bitlower.ir.version import __version__


@dataclass(frozen=True)
class GptqV2(Format):
    """GPTQModel's ``gptq_v2``."""

    name: ClassVar[str] = "gptq-v2"
    one_way_with_zeros: ClassVar[bool] = False
    readers: ClassVar[tuple[str, ...]] = ("gptqmodel",)
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (-1, 16, 32, 64, 128, 256, 512, 1024)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the other weights are."""
        return torch.float16

    def refusal(self, packed: Packed, shape: tuple[int, int], kind: str) -> str:
        """See :class:`Format`."""
        if kind == EMBEDDING:
            return "it holds linear layers only, no embedding tables"
        if packed.bits not in self.bits:
            return f"it holds codes of 2, 3, 4 and 8 bits, not of {packed.bits}"
        if packed.group_size not in self.group_sizes:
            sizes = ", ".join(map(str, self.group_sizes[1:]))
            return f"its clients know groups of {sizes} or whole rows, not of {packed.group_size}"
        step = packing.WORD // (packed.bits if packing.WORD % packed.bits == 0 else 1)
        for size, what in zip(shape, ("outputs", "inputs"), strict=True):
            if size % step:
                return f"{size} {what} of {packed.bits} bits do not fill 32-bit words; a multiple of {step} does"
        return ""

    def entries(self, layer: Layer, dtype: torch.dtype) -> Iterator[Entry]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        (rows, columns), groups, bits = layer.shape, layer.groups, layer.bits
        half, path = self.scale_dtype(dtype), layer.path
        shape = columns * bits // packing.WORD, rows
        yield Entry(f"{path}.qweight", torch.int32, shape, lambda: pack_codes(layer, packing.pack_gptq))
        shape = groups, rows * bits // packing.WORD
        yield Entry(f"{path}.qzeros", torch.int32, shape, lambda: packing.pack_gptq_zeros(layer.zeros(), bits))
        yield Entry(
            f"{path}.scales", half, (groups, rows), lambda: cast(layer.scales().T, half, f"the scale of {path}")
        )
        yield Entry(f"{path}.g_idx", torch.int32, (columns,), lambda: packing.gptq_groups(columns, columns // groups))

    def stored_bytes(self, packed: Packed, shape: tuple[int, int], scales: tuple[int, int], width: int) -> int:
        """Codes, zero points whether there are any or not, scales in 2 bytes, and the group of each input in 4."""
        (rows, columns), (count, groups) = shape, scales
        return 4 * rows * words(columns, packed.bits) + 4 * groups * words(rows, packed.bits) + 2 * count + 4 * columns

    def config(self, layers: Sequence[Layer], skeleton: Skeleton) -> dict[str, Any]:
        """The most common way of packing for all, and ``dynamic`` for what differs (``+:``) or stays float (``-:``).

        Raises:
            BitlowerError: a layer is neither in one of the model's blocks nor its head; clients leave such in float.
        """
        if skeleton.experts:
            raise BitlowerError(
                f"the format gptq-v2 cannot hold {skeleton.experts[0]}: transformers has the experts in one tensor",
                hint="use the format compressed-tensors, or the backend `onnx-qdq`",
            )
        for layer in layers:
            if layer.path != skeleton.head and not re.search(r"\.\d+\.", layer.path):
                raise BitlowerError(
                    f"the format gptq-v2 cannot hold {layer.path}: its clients know packed layers in the model's blocks"
                    " and its head only",
                    hint="leave the layer in float with `ignore`",
                )
        ways = [how_packed(layer) for layer in layers]
        base = max(dict.fromkeys(ways), key=ways.count)
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(layer.path)}$": _gptq_arguments(way)
            for layer, way in zip(layers, ways, strict=True)
            if way != base
        }
        left = [path for path in unpacked_linears(skeleton, tuple(layers)) if path != skeleton.head]
        dynamic |= {f"-:^{re.escape(path)}$": {} for path in left}
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            **_gptq_arguments(base),
            "desc_act": False,
            "lm_head": any(layer.path == skeleton.head for layer in layers),
            "pack_dtype": "int32",
            "dynamic": dynamic or None,
            "meta": {"quantizer": [f"bitlower:{__version__}"]},
        }

    def layers(self, config: Mapping[str, Any], folder: Tensors) -> dict[str, Packed]:
        """See :class:`Format`."""
        packed = {}
        for path in packed_paths(folder, ".qweight"):
            arguments = dict(config)
            for pattern, override in (config["dynamic"] or {}).items():
                if re.match(pattern[2:], path):
                    if pattern.startswith("-:"):
                        raise CheckError(f"config.json says that {path} is not packed")
                    arguments |= override
            packed[path] = Packed(arguments["bits"], arguments["group_size"], arguments["sym"])
        return packed

    def read(self, folder: Tensors, path: str, packed: Packed) -> Weight:
        """See :class:`Format`."""
        codes = packing.unpack_gptq(folder.tensor(f"{path}.qweight"), packed.bits)
        scales = folder.tensor(f"{path}.scales").float().T.contiguous()
        zeros = packing.unpack_gptq_zeros(folder.tensor(f"{path}.qzeros"), packed.bits)
        index = folder.tensor(f"{path}.g_idx")
        columns = codes.shape[1]
        if not torch.equal(index, packing.gptq_groups(columns, columns // scales.shape[1])):
            raise CheckError(f"the groups of {path} are not consecutive")
        if packed.symmetric and bool((zeros != 1 << (packed.bits - 1)).any()):
            raise CheckError(
                f"config.json says that {path} is symmetric; its zero points are not the middle of the codes"
            )
        return Weight(codes, scales, zeros)


def _gptq_arguments(packed: Packed) -> dict[str, Any]:
    return {"bits": packed.bits, "group_size": packed.group_size, "sym": packed.symmetric}
