"""Whether onnxruntime's products of unsigned and signed bytes are exact on this processor."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from bitlower.backends.onnx_qdq.runtime.session import Session

Signs = Literal["auto", "signed", "unsigned"]
SIGNS: tuple[Signs, ...] = ("auto", "signed", "unsigned")
_SIZE = 64


def chosen_signs(signs: Signs) -> Signs:
    """``signed`` or ``unsigned``: what was asked for, or what is exact here."""
    return ("unsigned" if clips_products() else "signed") if signs == "auto" else signs


@cache
def clips_products() -> bool:
    """Whether a product of large unsigned and signed bytes comes out too small.

    x86 processors without integer dot products (before AVX-VNNI and AVX512-VNNI) add two such products in 16 bits.
    """
    codes = np.full((_SIZE, _SIZE), 127, np.int8)
    node = helper.make_node("MatMulInteger", ["x", "codes"], ["y"])
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.UINT8, [_SIZE, _SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [_SIZE, _SIZE])],
        [numpy_helper.from_array(codes, "codes")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=onnx.IR_VERSION_2024_3_25)
    x = torch.full((_SIZE, _SIZE), 255, dtype=torch.uint8)
    y = Session(model.SerializeToString()).run({"x": x})["y"]
    return bool((y != 255 * 127 * _SIZE).any())
