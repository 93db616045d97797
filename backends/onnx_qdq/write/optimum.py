"""The layout in which optimum and transformers.js read an encoder-decoder: names, and what they cannot read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import onnx_ir as ir

from bitlower.ir import Program
from bitlower.ir.tokens import BATCH, PAST_NAME, is_past

Layout = Literal["genai", "optimum"]
"""What goes from the encoder of an encoder-decoder to its decoder: the keys and values of cross-attention, or the
states that they come from."""
OPTIMUM: Layout = "optimum"
MERGED = "decoder_model_merged.onnx"
"""The decoder: one for the first step and all later ones."""
OPTIMUM_DATA = "_data"
"""What the name of a file of tensors has behind that of its model."""
OPTIMUM_BATCH = "batch_size"
"""The dimension of rows: transformers.js makes an empty cache of the sizes that it knows by their names."""
_HEADS = ("num_heads", "encoder_attention_heads", "num_attention_heads")
_WIDTH = ("d_model", "hidden_size")


def name_rows(model: ir.Model) -> None:
    """Call the dimension of rows :data:`OPTIMUM_BATCH`."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs, *(made for node in graph for made in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([OPTIMUM_BATCH if dim == BATCH else dim for dim in value.shape])


def misreadings(program: Program) -> Iterator[str]:
    """A line if optimum makes an empty cache of other sizes than the model has: it divides the width by the heads."""
    heads, width = (
        next((program.config[name] for name in names if name in program.config), 0) for names in (_HEADS, _WIDTH)
    )
    cache = next((s.type.shape for s in program.inputs if is_past(s) and s.name.startswith(PAST_NAME)), None)
    if cache is None or not heads or (heads, width // heads) == (cache[1], cache[3]):
        return
    yield (
        f"optimum makes a first cache of {heads} heads of {width // heads}, this model's has {cache[1]} of {cache[3]}:"
        " optimum cannot run it; bitlower and transformers.js can"
    )
