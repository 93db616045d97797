"""Programs come back from disk as they were, and a document from elsewhere can name no code."""

import json
import operator
import os
import re

import pytest
import torch
from torch import fx, nn

from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec, ops, serialize, set_tensor


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=["exported", "quantized"])
def program(request):
    return request.getfixturevalue(request.param)


def test_a_program_comes_back_as_it_was(program, tmp_path):
    serialize.save(program, tmp_path / "new" / "folder")
    twin = serialize.load(tmp_path / "new" / "folder")
    assert str(twin) == str(program)
    assert twin.digest() == program.digest()
    assert (twin.level, twin.task, twin.inputs, twin.outputs) == (
        program.level,
        program.task,
        program.inputs,
        program.outputs,
    )
    assert (twin.config, twin.assets, twin.source, twin.passes) == (
        program.config,
        program.assets,
        program.source,
        program.passes,
    )
    assert [n.name for n in twin.graph.nodes] == [n.name for n in program.graph.nodes]
    for mine, theirs in zip(twin.graph.nodes, program.graph.nodes, strict=True):
        assert {k: v for k, v in theirs.meta.items() if mine.op != "output"} == mine.meta


def test_results_are_the_same_bit_for_bit(exported, batch, tmp_path):
    serialize.save(exported, tmp_path)
    twin = serialize.load(tmp_path)
    assert _equal(twin(**batch), exported(**batch))
    twin(**batch)["logits"].sum().backward()
    assert {n for n, t in twin.tensors() if isinstance(t, nn.Parameter)} == {
        n for n, t in exported.tensors() if isinstance(t, nn.Parameter)
    }


def test_an_integer_program_gives_the_same_codes(quantized, tmp_path):
    serialize.save(quantized, tmp_path)
    inputs = {"x": torch.randn(7, 2, generator=torch.Generator().manual_seed(0))}
    assert _equal(serialize.load(tmp_path)(**inputs), quantized(**inputs))


def test_tied_weights_stay_tied_and_are_stored_once(exported, tmp_path):
    _, tensors = serialize.encode(exported)
    assert len({"model/table.weight", "model/out.weight"} & tensors.keys()) == 1
    serialize.save(exported, tmp_path)
    twin = serialize.load(tmp_path)
    assert len({"model/table.weight", "model/out.weight"} & dict(twin.tensors()).keys()) == 1
    assert twin.size_bytes() == exported.size_bytes()
    assert (tmp_path / "program.safetensors").stat().st_size < exported.size_bytes() + 1000


def test_weights_shared_between_graphs_stay_shared(exported, tmp_path):
    graphs = {"second": exported.module, "model": exported.clone().module}
    both = Program(graphs, Level.FLOAT, "t", exported.inputs, exported.outputs)
    serialize.save(both, tmp_path)
    twin = serialize.load(tmp_path)
    assert list(twin.graphs) == ["second", "model"]
    assert twin.graphs["second"].norm.weight is twin.module.norm.weight
    assert (str(twin), twin.digest()) == (str(both), both.digest())


def test_views_of_one_storage_can_be_saved(quantized, tmp_path):
    storage = torch.arange(8.0)
    set_tensor(quantized.module, "quantizers.act.scale", storage[3])
    set_tensor(quantized.module, "quantizers.act.zero_point", storage[4])
    serialize.save(quantized, tmp_path)
    assert serialize.load(tmp_path).digest() == quantized.digest()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.uint8, torch.bfloat16, torch.float64, torch.bool])
def test_every_dtype_comes_back(quantized, dtype, tmp_path):
    codes = torch.tensor([[1, 0], [1, 1], [0, 0]]).to(dtype)
    set_tensor(quantized.module, "dense.weight_codes", codes)
    serialize.save(quantized, tmp_path)
    back = dict(serialize.load(tmp_path).tensors())["model/dense.weight_codes"]
    assert back.dtype == dtype
    assert torch.equal(back, codes)


def test_numbers_as_keys_are_the_same_before_and_after(exported, tmp_path):
    """Hugging Face's ``id2label`` has whole numbers as keys, JSON has not; 10 sorts before 2 only as text."""
    exported.config = {"id2label": {i: f"label-{i}" for i in range(12)}}
    serialize.save(exported, tmp_path)
    assert serialize.load(tmp_path).digest() == exported.digest()


def test_arguments_of_every_kind_come_back():
    graph = fx.Graph()
    x = graph.placeholder("x")
    arguments = [
        (torch.ops.aten.clamp.default, (x, float("-inf"), 1.5)),
        (torch.ops.aten.full_like.default, (x, float("nan"))),
        (torch.ops.aten.sum.dim_IntList, (x, [0, -1], True)),
    ]
    for target, args in arguments:
        graph.call_function(target, args)
    kwargs = {"dtype": torch.float64, "device": torch.device("cpu"), "memory_format": torch.preserve_format}
    graph.call_function(torch.ops.aten._to_copy.default, (x,), kwargs)
    graph.call_function(torch.ops.aten.empty_like.default, (x,), {"layout": torch.strided})
    graph.call_function(torch.sym_max, (graph.call_function(torch.ops.aten.sym_size.int, (x, 0)), 3))
    graph.call_function(operator.getitem, (x, (slice(None, 2, None), None)))
    graph.output((x,))
    spec = ValueSpec("x", TensorType(torch.float32, (4,)))
    program = Program({"model": fx.GraphModule(nn.Module(), graph)}, Level.FLOAT, "t", (spec,), (spec,))
    twin = serialize.decode(*serialize.encode(program))
    assert str(twin) == str(program)
    for mine, theirs in zip(twin.graph.nodes, program.graph.nodes, strict=True):
        assert mine.target == theirs.target
        assert repr(mine.args) == repr(theirs.args)
        assert mine.kwargs == theirs.kwargs


def test_saving_twice_gives_the_same_bytes(program, tmp_path):
    for name in ("a", "b"):
        serialize.save(program.clone(), tmp_path / name)
    for name in ("program.json", "program.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["program.json", "program.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(program, tmp_path, monkeypatch):
    serialize.save(program, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    program.task = "other"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        serialize.save(program, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


# ---- documents from elsewhere


def _document(nodes, **changes):
    form = {
        "format": serialize.FORMAT,
        "transposed": [],
        "context_length": None,
        "lengths": {},
        "level": "float",
        "task": "custom",
        "inputs": [["x", "float32", [2]]],
        "outputs": [["y", "float32", [2]]],
        "config": {},
        "assets": {},
        "source": "",
        "passes": [],
        "parameters": [],
        "aliases": {},
        "graphs": [["model", nodes]],
    }
    return json.dumps(form | changes)


INPUT = {"name": "x", "op": "placeholder", "target": "x", "args": []}


def _output(name):
    return {"name": "output", "op": "output", "target": "output", "args": [{"tuple": [{"%": name}]}]}


def _call(target, args=({"%": "x"},), **more):
    return [INPUT, {"name": "y", "op": "call_function", "target": target, "args": list(args), **more}, _output("y")]


def test_a_document_by_hand_is_a_program():
    program = serialize.decode(_document(_call("op:aten.relu.default")), {})
    assert program(x=torch.tensor([-1.0, 2.0]))["y"].tolist() == [0.0, 2.0]


INJECTION = "__import__('os').environ.__setitem__('BITLOWER_INJECTED', '1')"
HOSTILE = {
    "an operator nobody registered": _call("op:nobody.relu.default"),
    "an operator that does not exist": _call("op:aten.no_such_operator.default"),
    "an overload that does not exist": _call("op:aten.relu.no_such_overload"),
    "a packet of overloads": _call("op:aten.relu"),
    "a function of torch.ops": _call("op:load_library.x.y"),
    "dunder attributes": _call("op:aten.__class__.__init__"),
    "a function of torch": _call("torch:load"),
    "operator.call": _call("_operator:call"),
    "operator.attrgetter": _call("_operator:attrgetter", ["__globals__"]),
    "a builtin": _call("builtins:eval", [INJECTION]),
    "a bare name": _call("print"),
    "a method": [INPUT, {"name": "y", "op": "call_method", "target": "relu", "args": [{"%": "x"}]}, _output("y")],
    "a module": [INPUT, {"name": "y", "op": "call_module", "target": "m", "args": [{"%": "x"}]}, _output("y")],
    "code in an input's name": [INPUT | {"target": f"x={INJECTION}"}, _output("x")],
    "code in an argument's name": _call("op:aten.relu.default", kwargs={f"a={INJECTION}, b": 1}),
    "code in a tensor's name": [
        INPUT,
        {"name": "y", "op": "get_attr", "target": f'a", {INJECTION}, "b', "args": []},
        _output("y"),
    ],
    "a function as a constant": _call("op:aten.relu.default", [{"torch": "load"}]),
    "an argument of another kind": _call("op:aten.relu.default", [{"python": INJECTION}]),
    "a node that comes later": _call("op:aten.relu.default", [{"%": "z"}]),
    "a tensor that is not there": [
        INPUT,
        {"name": "y", "op": "get_attr", "target": "weight", "args": []},
        _output("y"),
    ],
    "another type": _call("op:aten.relu.default", meta={"type": ["load", [2]]}),
    "another spec": _call("op:aten.relu.default", meta={"quantizer": ["residual", {"num_bits": 99}, "x"]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_nodes_are_rejected_and_run_nothing(case, monkeypatch):
    monkeypatch.delenv("BITLOWER_INJECTED", raising=False)
    with pytest.raises(BitlowerError):
        serialize.decode(_document(HOSTILE[case]), {})
    assert "BITLOWER_INJECTED" not in os.environ


def test_code_in_a_nodes_name_is_only_a_name(monkeypatch):
    monkeypatch.delenv("BITLOWER_INJECTED", raising=False)
    name = f"y = {INJECTION}; z"
    nodes = [INPUT, {"name": name, "op": "call_function", "target": "op:aten.relu.default", "args": [{"%": "x"}]}]
    program = serialize.decode(_document([*nodes, _output(name)]), {})
    assert program(x=torch.tensor([-1.0, 1.0]))["y"].tolist() == [0.0, 1.0]
    assert "BITLOWER_INJECTED" not in os.environ


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("op:aten.no_such_operator.default", "unknown operator 'aten.no_such_operator.default'; load the plugin"),
        ("torch:load", "unknown operator 'torch:load'"),
    ],
)
def test_an_unknown_operator_is_named(target, words):
    with pytest.raises(BitlowerError, match=re.escape(words)):
        serialize.decode(_document(_call(target)), {})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "format 5"),
        ("{}", "format 5"),
        (_document([], format=99), "format 5"),
        (_document([], level="melted"), "damaged"),
        (_document([], parameters=["model/w"]), "damaged"),
        (_document([], aliases={"model/w": "model/v"}), "damaged"),
        (_document([], graphs=7), "damaged"),
        (_document([], inputs=[["x"]]), "damaged"),
        (_document([{"name": "x"}]), "damaged"),
    ],
)
def test_a_damaged_document_is_one_clear_error(document, words):
    with pytest.raises(BitlowerError, match=words):
        serialize.decode(document, {})


@pytest.mark.parametrize("name", ["program.json", "program.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_file_is_one_clear_error(exported, tmp_path, name, damage):
    serialize.save(exported, tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(BitlowerError, match="program"):
        serialize.load(tmp_path)


def test_what_cannot_be_saved_is_named():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(print, (x,))
    y.meta["path"] = "encoder.layer.0"
    graph.output((y,))
    program = Program({"model": fx.GraphModule(nn.Module(), graph)}, Level.FLOAT, "t", (), ())
    with pytest.raises(BitlowerError, match=r"%print_1 .* in encoder.layer.0 calls a function that cannot be saved"):
        serialize.encode(program)


def test_an_argument_that_cannot_be_saved_is_named(exported):
    node = next(n for n in exported.graph.nodes if n.op == "call_function")
    node.kwargs = {"generator": complex(1, 2)}
    with pytest.raises(BitlowerError, match="argument of type complex"):
        serialize.encode(exported)


def test_the_operators_of_bitlower_can_be_saved(quantized):
    document, _ = serialize.encode(quantized)
    for target in (ops.fake_quantize, ops.quantize, ops.dequantize, ops.choose_qparams):
        assert f'"op:{target}"' in document
