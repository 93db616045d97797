"""The formats by name, and what none of them can hold."""

from __future__ import annotations

from bitlower.backends.checkpoint.contents import is_symmetric
from bitlower.backends.checkpoint.formats.base import Format, Packed
from bitlower.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from bitlower.backends.checkpoint.formats.gptq import GptqV2
from bitlower.ir import BitlowerError, QuantSpec

FORMATS: dict[str, Format] = {form.name: form for form in (CompressedTensors(), GptqV2())}


def refusal(form: Format, spec: QuantSpec, shape: tuple[int, int], kind: str) -> str:
    """Why ``form`` cannot hold a weight [rows, columns] of a module of ``kind``; empty if it can."""
    granularity = spec.granularity
    if spec.grid.bits > 8:
        return f"checkpoint formats hold codes of up to 8 bits, not of {spec.grid.bits}"
    if granularity.kind not in ("tensor", "channel", "row-group", "group") or granularity.axis % 2 != (
        granularity.kind == "group"
    ):
        return f"checkpoint formats have a scale for each row or each group of inputs, not {granularity}"
    try:
        granularity.scale_shape(shape)
    except BitlowerError as error:
        return str(error)
    size = granularity.block_size(shape[1]) if granularity.kind == "group" else -1
    return form.refusal(Packed(spec.grid.bits, size, is_symmetric(spec)), shape, kind)
