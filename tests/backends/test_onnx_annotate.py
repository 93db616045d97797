"""Notes for viewers: they are there, they are right, and nothing that computes is changed by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from bitlower.backends.artifact.manifest import read_manifest
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import Program
from bitlower.passes import Context, PassManager, parse_pipeline

MODEL = "model.onnx"


@pytest.fixture(scope="module", params=[("W8A8", "qdq"), ("W4A16-g32", "onnxruntime")], ids=str)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, lowered: Callable[..., Program]
) -> tuple[Path, Path, Program]:
    """The artifact without notes, the same with them, and the Program."""
    scheme, form = request.param
    batches = random_windows(lowered("llama"), count=2, length=12)
    passes = parse_pipeline(f"quantize{{scheme={scheme}}},calibrate,lower-integer")
    program = PassManager(passes).run(lowered("llama"), Context(batches, batches))
    linears = [node.name for node in program.graph.nodes if "linear" in node.name and "dequantize" not in node.name]
    layers = [{"node": name, "path": "", "sqnr_db": 20.0 + place} for place, name in enumerate(linears)]
    folders = []
    for annotate in (False, True):
        folder = tmp_path_factory.mktemp("artifact")
        (folder / "ledger.json").write_text(json.dumps({"rows": [{"pass": "x", "layers": layers, "outputs": {}}]}))
        OnnxQdq(form=form, annotate=annotate).export(program, folder, batches)
        folders.append(folder)
    return folders[0], folders[1], program


def test_weights_and_kernels_stay_as_they_are(both: tuple[Path, Path, Program]) -> None:
    plain, noted, _ = both
    one, other = (onnx.load(folder / MODEL) for folder in (plain, noted))
    assert {t.name: t.SerializeToString() for t in one.graph.initializer} == {
        t.name: t.SerializeToString() for t in other.graph.initializer
    }
    kernels = [json.loads((folder / "verification.json").read_text())["kernels"] for folder in (plain, noted)]
    assert kernels[0] == kernels[1]
    assert kernels[0]["integer"] or kernels[0]["low_bit_weights"]
    for node in other.graph.node:
        del node.metadata_props[:]
    del other.graph.quantization_annotation[:]
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    OnnxQdq.verify(noted)


def test_nodes_say_their_module_their_bits_and_their_noise(both: tuple[Path, Path, Program]) -> None:
    _, noted, program = both
    model = onnx.load(noted / MODEL)
    props = {node.name: {entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node}
    paths = {node.name: node.meta.get("path") for node in program.graph.nodes}
    for node in model.graph.node:
        for name in node.output:
            if paths.get(name):
                assert props[node.name]["bitlower.module"] == paths[name]
    for quantizer_node, quantizer in program.quantizers():
        readers = [
            n.name for n in model.graph.node if quantizer_node.name in n.output and n.op_type == "QuantizeLinear"
        ]
        for name in readers:
            assert props[name]["bitlower.bits"] == str(quantizer.spec.grid.bits)
    weights = [n for n in model.graph.node if any(name.endswith("proj.weight_codes") for name in n.input)]
    bits = {quantizer.spec.grid.bits for _, quantizer in program.quantizers() if quantizer.role == "linear-weight"}
    assert len(weights) == 14
    assert {props[node.name]["bitlower.bits"] for node in weights} == set(map(str, bits))
    assert {props[node.name]["bitlower.module"].rpartition(".")[2] for node in weights} >= {"q_proj", "down_proj"}
    noise = {name: float(found["bitlower.sqnr_db"]) for name, found in props.items() if "bitlower.sqnr_db" in found}
    assert noise
    wanted = {
        row["node"]: row["sqnr_db"] for row in json.loads((noted / "ledger.json").read_text())["rows"][0]["layers"]
    }
    for node in model.graph.node:
        if node.name in noise:
            assert noise[node.name] in [wanted[name] for name in node.output if name in wanted]


def test_codes_name_their_scales(both: tuple[Path, Path, Program]) -> None:
    _, noted, _ = both
    graph = onnx.load(noted / MODEL).graph
    initializers = {tensor.name for tensor in graph.initializer}
    named = {
        a.tensor_name: {p.key: p.value for p in a.quant_parameter_tensor_names} for a in graph.quantization_annotation
    }
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[1] in initializers]
    assert {node.output[0] for node in rounded} <= named.keys()
    for node in rounded:
        assert named[node.output[0]]["SCALE_TENSOR"] == node.input[1]
    for parameters in named.values():
        assert set(parameters.values()) <= initializers


def test_overlays_name_nodes_of_the_model(both: tuple[Path, Path, Program]) -> None:
    plain, noted, _ = both
    names = {node.name for node in onnx.load(noted / MODEL).graph.node}
    assert not (plain / "overlays").exists()
    assert read_manifest(noted).files.keys() >= {"overlays/bits.json", "overlays/sqnr_db.json"}
    for metric in ("bits", "sqnr_db"):
        form = json.loads((noted / "overlays" / f"{metric}.json").read_text())
        assert form["results"].keys() <= names
        assert all(isinstance(entry["value"], float) for entry in form["results"].values())
        assert [stop["stop"] for stop in form["gradient"]] == [0.0, 0.5, 1.0]
        assert len(form["results"]) >= 2
