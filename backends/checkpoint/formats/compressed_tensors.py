"""compressed-tensors' ``pack-quantized`` format, for transformers with that library, and vLLM.

The codes of a row are one dense stream of 32-bit words. For 2, 4 and 8 bits that is what every version of the library
reads; other widths need one that packs densely (0.20 does).
"""

from __future__ import annotations

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
from bitlower.backends.checkpoint.skeleton import CONV1D, EMBEDDING, Skeleton
from bitlower.ir import BitlowerError, CheckError, packing


@dataclass(frozen=True)
class CompressedTensors(Format):
    """compressed-tensors' ``pack-quantized``."""

    name: ClassVar[str] = "compressed-tensors"
    unfolds = True
    one_way_with_zeros: ClassVar[bool] = True
    readers: ClassVar[tuple[str, ...]] = ("compressed_tensors", "accelerate")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the other weights: its decompressor returns weights in the type of the scales."""
        return dtype

    def refusal(self, packed: Packed, shape: tuple[int, int], kind: str) -> str:
        """See :class:`Format`."""
        if kind == CONV1D:
            return "its clients quantize Linear modules, and this is a Conv1D; the format gptq-v2 can hold it"
        if kind == EMBEDDING:
            return "transformers loads packed linear layers only, no embedding tables"
        return ""

    def entries(self, layer: Layer, dtype: torch.dtype) -> Iterator[Entry]:
        """``weight_packed``, ``weight_scale``, ``weight_shape`` and, if asymmetric, ``weight_zero_point``."""
        (rows, columns), groups, bits = layer.shape, layer.groups, layer.bits
        name = f"{layer.path}.weight"
        across = words(columns, bits)
        yield Entry(f"{name}_packed", torch.int32, (rows, across), lambda: pack_codes(layer, packing.pack_compressed))
        yield Entry(
            f"{name}_scale", dtype, (rows, groups), lambda: cast(layer.scales(), dtype, f"the scale of {layer.path}")
        )
        yield Entry(f"{name}_shape", torch.int64, (2,), lambda: torch.tensor(layer.shape))
        if not layer.symmetric:
            yield Entry(
                f"{name}_zero_point",
                torch.int32,
                (words(rows, bits), groups),
                lambda: packing.pack_compressed_zeros(layer.zeros(), bits),
            )

    def stored_bytes(self, packed: Packed, shape: tuple[int, int], scales: tuple[int, int], width: int) -> int:
        """Codes, zero points if there are any, scales as wide as the other weights, and the shape."""
        (rows, columns), (count, groups) = shape, scales
        zeros = 0 if packed.symmetric else 4 * groups * words(rows, packed.bits)
        return 4 * rows * words(columns, packed.bits) + width * count + zeros + 16

    def config(self, layers: Sequence[Layer], skeleton: Skeleton) -> dict[str, Any]:
        """One group for each way of packing; all ``Linear`` modules and a list of exceptions where there is one way.

        transformers does not know the shape of packed zero points, and packed modules have no weight that a ``forward``
        of the model's own could read, or what initializes a module around them. All work with weights that it
        dequantizes as it loads them, which ``dequantize`` asks for.

        Raises:
            BitlowerError: such layers and others; as it loads, transformers dequantizes all layers alike.
        """
        ways: dict[Packed, list[str]] = {}
        for layer in layers:
            ways.setdefault(how_packed(layer), []).append(layer.path)
        own = next((layer.path for layer in layers if layer.path in skeleton.own | skeleton.initialized), None)
        asymmetric = not all(way.symmetric for way in ways)
        if asymmetric and skeleton.experts:
            raise BitlowerError("transformers reads experts without zero points only", hint="use a symmetric scheme")
        dequantize = asymmetric or own is not None or bool(skeleton.experts)
        if dequantize and len(ways) > 1:
            one, other = (paths[0] for paths in list(ways.values())[:2])
            read = {path: f"initialized by {name}" for path, name in skeleton.initialized.items()}
            read |= {path: f"a {name}" for path, name in skeleton.own.items()}
            why = f"{own} is {read[own]}" if own is not None else "one with zero points"
            why = "there are experts" if skeleton.experts else why
            raise BitlowerError(
                f"{one} and {other} are quantized in different ways, and {why}: transformers cannot load that",
                hint="quantize all layers alike, or use the format gptq-v2",
            )
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            **({"dequantize": True} if dequantize else {}),
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if len(ways) == 1 else paths,
                    "weights": _compressed_arguments(way),
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
                for i, (way, paths) in enumerate(ways.items())
            },
            "ignore": unpacked_linears(skeleton, tuple(layers)),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def layers(self, config: Mapping[str, Any], folder: Tensors) -> dict[str, Packed]:
        """See :class:`Format`."""
        packed = {}
        for path in packed_paths(folder, ".weight_packed"):
            groups = list(config["config_groups"].values())
            group = next((g for g in groups if path in g["targets"] or "Linear" in g["targets"]), None)
            if group is None or path in config["ignore"]:
                raise CheckError(f"config.json does not say how {path} is packed")
            arguments = group["weights"]
            packed[path] = Packed(arguments["num_bits"], arguments["group_size"] or -1, arguments["symmetric"])
        return packed

    def read(self, folder: Tensors, path: str, packed: Packed) -> Weight:
        """See :class:`Format`."""
        name, bits = f"{path}.weight", packed.bits
        rows, columns = folder.tensor(f"{name}_shape").tolist()
        codes = packing.unpack_compressed(folder.tensor(f"{name}_packed"), bits, columns)
        scales = folder.tensor(f"{name}_scale").float()
        if packed.symmetric:
            zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
        else:
            zeros = packing.unpack_compressed_zeros(folder.tensor(f"{name}_zero_point"), bits, rows)
        return Weight(codes, scales, zeros)


def _compressed_arguments(packed: Packed) -> dict[str, Any]:
    grouped = packed.group_size > 0
    return {
        "num_bits": packed.bits,
        "type": "int",
        "symmetric": packed.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": packed.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }
