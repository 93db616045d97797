"""A quantized two-layer Program, and the ONNX model of it written by hand, so that no exporter is under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import (
    Granularity,
    Grid,
    Level,
    Program,
    Quantizer,
    QuantSpec,
    TensorType,
    ValueSpec,
    ops,
    set_tensor,
)
from bitlower.passes import Context, PassManager, parse_pipeline

WIDTHS = (8, 16, 8)
ACT = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
WEIGHT = QuantSpec(Grid(8), Granularity.per_channel(0))
Edit = Callable[[onnx.ModelProto], None]
Lowered = Callable[..., Program]


@dataclass(frozen=True)
class Handmade:
    """The Program, its tensors by ONNX name, inputs, and :meth:`write`."""

    program: Program
    tensors: dict[str, np.ndarray[Any, Any]]
    batches: list[dict[str, torch.Tensor]]

    def write(self, folder: Path, *edits: Edit) -> Path:
        """Write ``model.onnx``, changed by ``edits``, into ``folder``."""
        model = self.model()
        for edit in edits:
            edit(model)
        folder.mkdir(exist_ok=True)
        onnx.save(model, folder / "model.onnx")
        return folder

    def model(self) -> onnx.ModelProto:
        """QuantizeLinear → DequantizeLinear → MatMul → Sum, twice, with a Gelu between.

        Add in place of Sum would let onnxruntime make a Gemm of it, which it runs in float.
        """
        nodes: list[onnx.NodeProto] = []
        for x, stem, codes, out in (("x", "up", "x_codes", "up_out"), ("gelu", "down", "act_codes", "y")):
            parameters = [f"{codes}.scale", f"{codes}.zero_point"]
            nodes += [
                helper.make_node("QuantizeLinear", [x, *parameters], [codes], name=f"Q_{codes}"),
                helper.make_node("DequantizeLinear", [codes, *parameters], [f"{codes}_real"], name=f"DQ_{codes}"),
                helper.make_node(
                    "DequantizeLinear", [f"{stem}.weight_codes", f"{stem}.weight_scale"], [f"{stem}_w"], axis=1,
                    name=f"DQ_{stem}",
                ),
                helper.make_node("MatMul", [f"{codes}_real", f"{stem}_w"], [f"{stem}_mm"], name=f"MatMul_{stem}"),
                helper.make_node("Sum", [f"{stem}_mm", f"{stem}.bias"], [out], name=f"Bias_{stem}"),
            ]  # fmt: skip
            if stem == "up":
                nodes.append(helper.make_node("Gelu", ["up_out"], ["gelu"], name="Gelu"))
        return helper.make_model(
            helper.make_graph(
                nodes,
                "handmade",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTHS[0]])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTHS[2]])],
                [numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )


@pytest.fixture
def handmade() -> Handmade:
    """x [batch, 8] → quantize → linear → gelu → quantize → linear → y [batch, 8]."""
    return _handmade()


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of ``handmade``; not to be written to."""
    from bitlower.backends.onnx_qdq.verify.artifact import write_manifest
    from bitlower.backends.onnx_qdq.verify.compare import verify_export

    made = _handmade()
    folder = made.write(tmp_path_factory.mktemp("artifact") / "sound")
    (folder / "config.json").write_text("{}")
    verify_export(made.program, folder, made.batches[:1]).write(folder)
    write_manifest(made.program, folder)
    return folder


def _handmade() -> Handmade:
    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for stem, rows, columns in (("up", *WIDTHS[:2]), ("down", *WIDTHS[1:])):
        # Of 7 bits: with more, processors without integer dot products clip sums of signed products.
        tensors[f"{stem}.weight_codes"] = random.integers(-63, 64, (rows, columns), dtype=np.int8)
        tensors[f"{stem}.weight_scale"] = random.uniform(0.002, 0.02, columns).astype(np.float32)
        tensors[f"{stem}.bias"] = random.normal(0, 0.1, columns).astype(np.float32)
    for codes, scale, zero in (("x_codes", 0.031, 120), ("act_codes", 0.0173, 10)):
        tensors[f"{codes}.scale"] = np.array(scale, np.float32)
        tensors[f"{codes}.zero_point"] = np.array(zero, np.uint8)
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(rows, WIDTHS[0], generator=generator)} for rows in (7, 64, 5)]
    return Handmade(_program(tensors), tensors, batches)


def _program(tensors: dict[str, np.ndarray[Any, Any]]) -> Program:
    root = fx.GraphModule(nn.Module(), fx.Graph())
    for name, array in tensors.items():
        value = torch.from_numpy(array.copy())
        if name.endswith("weight_codes"):
            set_tensor(root, name, value.T.contiguous())
        elif name.endswith("weight_scale"):
            stem = name.removesuffix("_scale")
            set_tensor(root, f"quantizers.{stem}.scale", value[:, None])
            set_tensor(root, f"quantizers.{stem}.zero_point", torch.zeros(value.shape[0], 1))
        elif name.endswith("bias"):
            set_tensor(root, name, nn.Parameter(value))
        else:
            set_tensor(root, f"quantizers.{name}", value.float())
    value = TensorType(torch.float32, ("batch", WIDTHS[0]))
    inputs, outputs = (ValueSpec("x", value),), (ValueSpec("y", value),)
    return Program({"model": fx.GraphModule(root, _graph())}, Level.INTEGER, "custom", inputs, outputs)


def _graph() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["type"] = TensorType(torch.float32, ("batch", WIDTHS[0]))
    up = _linear(graph, x, "up", "x_codes", WIDTHS[1])
    gelu = _node(graph, "gelu", torch.ops.aten.gelu.default, (up,), WIDTHS[1])
    graph.output((_linear(graph, gelu, "down", "act_codes", WIDTHS[2]),))
    return graph


def _linear(graph: fx.Graph, x: fx.Node, stem: str, codes: str, width: int) -> fx.Node:
    quantizer = Quantizer("linear-input", ACT, x.name)
    parameters = (graph.get_attr(f"quantizers.{codes}.scale"), graph.get_attr(f"quantizers.{codes}.zero_point"))
    size = x.meta["type"].shape[1]
    code = _node(graph, codes, ops.quantize, (x, *parameters, 0, 255, "uint8"), size, quantizer, torch.uint8)
    real = _node(graph, f"{codes}_real", ops.dequantize, (code, *parameters), size, quantizer)
    path = f"{stem}.weight"
    parts = tuple(graph.get_attr(name) for name in _weight_names(path))
    weight = _node(graph, f"{stem}_w", ops.dequantize, parts, size, Quantizer("linear-weight", WEIGHT, path))
    return _node(
        graph, f"{stem}_out", torch.ops.aten.linear.default, (real, weight, graph.get_attr(f"{stem}.bias")), width
    )


def _weight_names(path: str) -> Sequence[str]:
    return f"{path}_codes", f"quantizers.{path}.scale", f"quantizers.{path}.zero_point"


def _node(
    graph: fx.Graph,
    name: str,
    target: Any,
    args: tuple[Any, ...],
    width: int,
    quantizer: Quantizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> fx.Node:
    node = graph.create_node("call_function", target, args, name=name)
    node.meta = {"type": TensorType(dtype, ("batch", width)), "path": name.split("_")[0]}
    if quantizer:
        node.meta["quantizer"] = quantizer
    return node


@cache
def _decoder(kind: str) -> Program:
    """A tiny random decoder, cleaned: ``llama``, ``llama-tied`` or ``gpt2``; vocabulary 96, width 64."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, bos_token_id=0, eos_token_id=0, **sizes))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        tied = kind == "llama-tied"
        model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, tie_word_embeddings=tied, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if name.endswith("bias") or "norm" in name or "ln_" in name else 0.2
            parameter += spread * torch.randn(parameter.shape)
    return PassManager(parse_pipeline("clean")).run(load(model.eval(), task="text-generation"), Context())


@cache
def _lowered(kind: str, scheme: str, ignore: str) -> Program:
    placed = f"quantize{{scheme={scheme}{f' ignore=[{ignore}]' if ignore else ''}}}"
    passes = parse_pipeline(f"{placed},calibrate{{weights=minmax}},lower-integer")
    return PassManager(passes).run(_decoder(kind), Context())


@pytest.fixture(scope="session")
def lowered() -> Lowered:
    """``lowered(kind, scheme, ignore="")``: a tiny decoder whose weights are codes; in float without a scheme."""

    def build(kind: str = "llama", scheme: str = "", ignore: str = "") -> Program:
        return (_lowered(kind, scheme, ignore) if scheme else _decoder(kind)).clone()

    return build


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, torch.Tensor]]:
    """Two batches of token ids for ``lowered``, the first padded on the left."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for padding in (3, 0):
        mask = torch.ones((2, 9), dtype=torch.int64)
        mask[0, :padding] = 0
        ids = torch.randint(0, 96, mask.shape, generator=generator)
        result.append({"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    return result
