from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bitlower.backends.artifact.config import quantization_config
from bitlower.backends.onnx_qdq import export, verify
from bitlower.backends.onnx_qdq.backend import operators
from bitlower.backends.onnx_qdq.rewrite.linear import Form
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower, rewrite
from bitlower.backends.onnx_qdq.translate.translator import translate
from bitlower.backends.onnx_qdq.write.files import write_model
from bitlower.frontends import load
from bitlower.ir import Granularity, Grid, Program, QuantSpec, ScaleConvention, Scheme, get_tensor, ops
from bitlower.passes import Context, PassManager
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

LINEARS, WIDTH, VOCABULARY = 13, 32, 100


@cache
def encoder(kind: str = "BertModel") -> Program:
    """Two layers of width 32 with four heads, random weights; 13 linears with the pooler (or the classifier)."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        num_labels=3,
    )
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # so that attention is not uniform, and mistakes in it show
    program = load(model)
    return PassManager([Clean()]).run(program, Context())


def batch(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if rows > 1:
        mask[-1, length // 2 :] = 0
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


BATCHES = [batch(3, 11, 1), batch(2, 17, 2)]


def quantized(program: Program, scheme: Scheme | str, batches: list[dict[str, torch.Tensor]] | None = None) -> Program:
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    passes = [Quantize(scheme=parsed), Calibrate(weights="minmax"), LowerInteger()]
    return PassManager(passes).run(program, Context(calibration=batches or BATCHES))


@cache
def integer(scheme: str, kind: str = "BertModel") -> Program:
    return encoder(kind) if scheme == "float" else quantized(encoder(kind), scheme)


@cache
def translated(scheme: str, kind: str, opset: int) -> ir.Model:
    return translate(integer(scheme, kind), opset)


@dataclasses.dataclass(frozen=True)
class Written:
    """A program of ours and the folder with its model."""

    program: Program
    folder: Path
    model: onnx.ModelProto

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"


Write = Callable[..., Written]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """``written(scheme, form, opset, kind)``: written once for all tests that ask for the same."""

    @cache
    def give(scheme: str, form: Form = "qdq", opset: int = 23, kind: str = "BertModel") -> Written:
        model, _ = rewrite(translated(scheme, kind, opset).clone(), form)
        return save(integer(scheme, kind), model, tmp_path_factory.mktemp("model"))

    return give


def save(program: Program, model: ir.Model, folder: Path) -> Written:
    write_model(model, folder, threshold=10**9)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return Written(program, folder, onnx.load(folder / "model.onnx"))


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """With onnxruntime's own defaults: what users get."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kernels(folder: Path) -> Counter[str]:
    """The operators that onnxruntime runs."""
    session(folder / "model.onnx", folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def check_equal(program: Program, path: Path, batches: list[dict[str, torch.Tensor]], steps: float = 0.0) -> None:
    """The outputs agree to float accuracy, but for a share of 1 % that may be ``steps`` off after a tie."""
    runtime = session(path)
    for inputs in batches:
        with torch.no_grad():
            expected = program(**inputs)
        found = runtime.run(None, {name: value.numpy() for name, value in inputs.items()})
        for (name, reference), value in zip(expected.items(), found, strict=True):
            assert value.shape == tuple(reference.shape), name
            error = np.abs(value - reference.numpy()) / float(reference.std())
            assert np.quantile(error, 0.5) < 1e-5, name
            assert error.max() < max(steps, 1e-4), name


OTHER_SHAPES = [batch(1, 1), batch(1, 40, 3), batch(5, 9, 4)]


SCHEMES = {
    "float": 0,
    "W8A8": LINEARS,
    "W8A8-tensor-e4": LINEARS,
    "W8A8-asym": LINEARS,
    "W4A8": LINEARS,
    "W8A4": LINEARS,
    "W8A8-token": LINEARS,
    "W8A12": 0,
    "W8A16": 0,
    "W4A16-g8": 0,
    "W4A8-g8": 0,
    "W8A8-peg4": 0,
}
"""How many integer matmuls each scheme must give."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_computes_what_the_program_does_on_integer_kernels(scheme: str, written: Write) -> None:
    it = written(scheme)
    check_equal(it.program, it.path, [*BATCHES, *OTHER_SHAPES], steps=0.5 if scheme != "float" else 0.0)
    found = kernels(it.folder)
    assert found["MatMulIntegerToFloat"] + found["MatMulInteger"] == SCHEMES[scheme]
    assert found["MatMulNBits"] == found["BiasGelu"] == found["SkipLayerNormalization"] == 0
    assert found["Attention"] == 2


def test_a_classifier_is_exported(written: Write) -> None:
    it = written("W8A8", kind="BertForSequenceClassification")
    check_equal(it.program, it.path, [*BATCHES, *OTHER_SHAPES], steps=0.5)
    assert kernels(it.folder)["MatMulIntegerToFloat"] == LINEARS + 1


@pytest.mark.parametrize(
    ("scheme", "form", "opset"),
    [
        ("float", "qdq", 21),
        ("W8A8", "qdq", 21),
        ("W8A8", "onnxruntime", 21),
        ("W8A8", "onnxruntime", 23),
        ("W8A8", "qdq", 24),
        ("W8A8-token", "onnxruntime", 23),
    ],
)
def test_every_opset_and_form_computes_the_same(scheme: str, form: str, opset: int, written: Write) -> None:
    it = written(scheme, form, opset)
    assert {entry.domain: entry.version for entry in it.model.opset_import}[""] == opset
    used = Counter(node.op_type for node in it.model.graph.node)
    assert used["Attention"] == (2 if opset >= 23 else 0)
    assert used["MatMulIntegerToFloat"] == (LINEARS if form == "onnxruntime" and scheme == "W8A8" else 0)
    check_equal(it.program, it.path, [*BATCHES, batch(1, 6)], steps=0.5)
    found = kernels(it.folder)
    assert found["MatMulIntegerToFloat"] + found["MatMulInteger"] == (0 if scheme == "float" else LINEARS)


@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
def test_the_full_placement_multiplies_activations_in_integers_too(form: str, written: Write) -> None:
    it = written("W8A8-full", form)
    found = kernels(it.folder)
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == LINEARS + 4
    assert found["MatMul"] == found["Gemm"] == found["FusedMatMul"] == 0
    check_equal(it.program, it.path, [batch(1, 5)], steps=1.0)


def _codes(program: Program, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.target is ops.quantize:
                found[n.name] = value.numpy()
            return value

    with torch.no_grad():
        Recorder(program.module).run(*program.arguments(inputs))
    return found


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8-full", "W8A8-token", "W8A4", "W8A8-peg4", "W8A12"])
@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
def test_codes_bear_the_names_of_the_program_and_are_equal(scheme: str, form: str, written: Write) -> None:
    it = written(scheme, form)
    model = onnx.ModelProto()
    model.CopyFrom(it.model)
    expected = _codes(it.program, BATCHES[0])
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in expected)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = runtime.run(list(expected), {name: value.numpy() for name, value in BATCHES[0].items()})
    assert len(expected) >= 9
    first = next(iter(expected))
    for (name, codes), value in zip(expected.items(), found, strict=True):
        assert value.dtype == codes.dtype
        assert value.shape == codes.shape
        equal = float((value == codes).mean())
        assert equal == 1.0 if name == first else equal > 0.95, name


def test_weight_codes_are_stored_once_under_their_own_name(written: Write) -> None:
    program = integer("W8A8")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in written("W8A8").model.graph.initializer}
    codes = [name for name, value in stored.items() if value.dtype in (np.int8, np.uint8) and value.ndim == 2]
    expected = [str(n.target) for n in program.graph.find_nodes(op="get_attr") if str(n.target).endswith("_codes")]
    assert sorted(codes) == sorted(expected)
    query = "encoder.layer.0.attention.self.query.weight_codes"
    codes = get_tensor(program.module, query).numpy().T.astype(int)
    np.testing.assert_array_equal(stored[query].astype(int) - (128 if stored[query].dtype == np.uint8 else 0), codes)
    table = "embeddings.word_embeddings.weight_codes"
    np.testing.assert_array_equal(stored[table], get_tensor(program.module, table).numpy())
    assert not [name for name, value in stored.items() if value.dtype == np.float32 and value.size > VOCABULARY]


CONVENTIONS = [
    QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_token()),
    QuantSpec(Grid(8), Granularity.per_token()),
    QuantSpec(Grid(8, signed=True, symmetric=False), Granularity.per_token()),
    QuantSpec(Grid(6, restricted=True), Granularity.per_token()),
    QuantSpec(Grid(8, convention=ScaleConvention.HALF_RANGE), Granularity.per_token()),
    QuantSpec(Grid(8, convention=ScaleConvention.HALF_RANGE_EPS), Granularity.per_token()),
    QuantSpec(Grid(8, signed=False, convention=ScaleConvention.OFFSET), Granularity.per_token()),
    QuantSpec(Grid(8), Granularity.per_tensor()),
    QuantSpec(Grid(7, restricted=True), Granularity.per_tensor()),
]
CASES = [*((spec, "W8A8") for spec in CONVENTIONS), *((spec, "W8A8-asym") for spec in CONVENTIONS[:2])]


class Perceptron(torch.nn.Module):
    """A residual block on [batch, width], with a ReLU so that one-sided grids have a use."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 16, bias=False)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


@cache
def perceptron() -> Program:
    torch.manual_seed(0)
    return load(Perceptron().eval(), example_inputs={"x": torch.randn(3, 16)})


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    values = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    values[0] = 0.0  # a token without a range
    return {"x": values}


@pytest.mark.parametrize(("spec", "weights"), CASES, ids=str)
def test_every_grid_of_activations_runs_on_integer_kernels(spec: QuantSpec, weights: str, tmp_path: Path) -> None:
    scheme = dataclasses.replace(Scheme.parse(weights), activations=spec)
    program = quantized(perceptron(), scheme, [rows(6)])
    it = save(program, lower(program, opset=23, form="qdq")[0], tmp_path)
    check_equal(program, it.path, [rows(6), rows(1, 2), rows(9, 3)], steps=0.2)
    found = kernels(tmp_path)
    assert found["MatMulIntegerToFloat"] + found["MatMulInteger"] == 3


@pytest.mark.parametrize(
    ("weights", "grid", "integers"),
    [
        (Granularity.row_group(4), Grid(8), 3),
        (Granularity.row_group(4), Grid(4, signed=False, symmetric=False), 3),
        (Granularity.per_channel(1), Grid(8), 0),
        (Granularity.per_group(8), Grid(4, signed=False, symmetric=False), 0),
        (Granularity.per_channel(0), Grid(12), 0),
    ],
    ids=str,
)
def test_every_granularity_of_weights_is_expressed(
    weights: Granularity, grid: Grid, integers: int, tmp_path: Path
) -> None:
    scheme = dataclasses.replace(Scheme.parse("W8A8"), weights=QuantSpec(grid, weights), embeddings=None)
    program = quantized(perceptron(), scheme, [rows(6)])
    it = save(program, lower(program, opset=23, form="qdq")[0], tmp_path)
    check_equal(program, it.path, [rows(6), rows(2, 2)], steps=0.2)
    assert kernels(tmp_path)["MatMulIntegerToFloat"] == integers


def test_two_exports_are_equal_byte_for_byte_and_name_no_path(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        export(integer("W8A8"), tmp_path / name, batches=BATCHES)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["README.md", "config.json", "manifest.json", "model.onnx", "verification.json"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    data = (tmp_path / "first" / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in data
    assert b".py" not in data


def test_an_export_reports_and_verifies(tmp_path: Path) -> None:
    program = integer("W8A8")
    report = export(program, tmp_path, batches=BATCHES, form="onnxruntime")
    assert report.operators["com.microsoft.MatMulIntegerToFloat"] == LINEARS
    assert report.rules["integer-linear"] == {"applied": LINEARS, "refused": {}}
    assert report.files["model.onnx"] == (tmp_path / "model.onnx").stat().st_size
    json.dumps(report.to_dict())
    assert verify(tmp_path).kernels.found == LINEARS
    model = onnx.load(tmp_path / "model.onnx")
    assert model.producer_name == "bitlower"
    values = [*model.graph.input, *model.graph.output]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "sequence"]
    assert shapes["last_hidden_state"] == ["batch", "sequence", WIDTH]
    assert shapes["pooler_output"] == ["batch", WIDTH]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_the_configuration_says_what_is_quantized(tmp_path: Path) -> None:
    program = integer("W8A8")
    export(program, tmp_path, batches=BATCHES)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == WIDTH
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitlower"
    group = quantization["config_groups"]["group_0"]
    assert len(group["targets"]) == LINEARS
    assert QuantSpec.from_dict(group["weights"]) == Scheme.parse("W8A8").weights
    assert QuantSpec.from_dict(group["input_activations"]) == Scheme.parse("W8A8").activations
    assert set(quantization["roles"]) == {"linear-weight", "embedding-table", "linear-input"}
    assert quantization_config(integer("float"), "onnx")["config_groups"] == {}


def test_large_tensors_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    program = integer("W8A8")
    report = export(program, tmp_path, batches=BATCHES, external_data_threshold=1000)
    assert set(report.files) == {"model.onnx", "model.onnx.data", "config.json", "README.md"}
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {"model.onnx.data"}
    check_equal(program, tmp_path / "model.onnx", BATCHES, steps=0.5)


def test_operators_are_counted_with_their_domain() -> None:
    counts = operators(rewrite(translated("W8A8", "BertModel", 23).clone(), "onnxruntime")[0])
    assert counts["QuantizeLinear"] == 9
    assert counts["com.microsoft.MatMulIntegerToFloat"] == LINEARS
