"""Programs run, are copied, edited, measured and hashed."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec, copy_module, get_tensor, set_tensor
from bitlower.ir.tensors import tensor_digest

ROOT = Path(__file__).parents[2]


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_program_is_the_model(exported, batch):
    results = exported(**batch)
    assert list(results) == ["hidden", "logits"]
    assert results["hidden"].shape == (3, 5, 8)
    table = get_tensor(exported.module, "table.weight")
    torch.testing.assert_close(results["logits"], (results["hidden"] @ table.T)[:, 1:])


def test_inputs_go_by_name(exported, batch):
    assert _equal(exported(**dict(reversed(batch.items()))), exported(**batch))
    with pytest.raises(BitlowerError, match="no input 'masc'; did you mean 'mask'"):
        exported(**batch, masc=batch["mask"])
    with pytest.raises(BitlowerError, match="input 'mask' is missing; the model takes ids, mask"):
        exported(ids=batch["ids"])


def test_a_program_is_differentiable(exported, batch):
    exported(**batch)["logits"].square().sum().backward()
    gradients = [t.grad for _, t in exported.tensors() if isinstance(t, nn.Parameter)]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_clone_shares_tensors_and_nothing_else(exported, batch):
    before, text = exported.digest(), str(exported)
    twin = exported.clone()
    assert twin.digest() == before
    assert all(a is b for (_, a), (_, b) in zip(exported.tensors(), twin.tensors(), strict=True))
    node = next(n for n in twin.graph.nodes if n.target is torch.ops.aten.layer_norm.default)
    node.meta["path"] = "elsewhere"
    node.replace_all_uses_with(node.args[0])
    twin.config["x"] = 1
    twin.assets.clear()
    twin.passes.append("edit")
    set_tensor(twin.module, "offset", torch.zeros(8))
    twin.recompile()
    assert (exported.digest(), str(exported)) == (before, text)
    assert not _equal(twin(**batch), exported(**batch))


def test_copies_keep_names_meta_and_kinds_of_tensors(exported):
    module = exported.module
    twin = copy_module(module)
    assert [n.name for n in twin.graph.nodes] == [n.name for n in module.graph.nodes]
    assert [n.meta for n in twin.graph.nodes] == [n.meta for n in module.graph.nodes]
    assert all(a.meta is not b.meta for a, b in zip(twin.graph.nodes, module.graph.nodes, strict=True))
    assert twin.training == module.training
    assert {n for n, _ in twin.named_parameters()} == {n for n, _ in module.named_parameters()}
    assert copy.deepcopy(twin)(*_inputs())[0].shape == (2, 4, 8)


def _inputs():
    return torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)


def test_recompile_drops_the_dead_but_no_inputs(exported):
    graph = exported.graph
    logits = graph.output_node().args[0][0]
    graph.output_node().args = ((logits,),)
    exported.outputs = exported.outputs[:1]
    mask = next(n for n in graph.nodes if n.target == "mask")
    for user in list(mask.users):
        user.replace_input_with(mask, next(n for n in graph.nodes if n.target == "ids"))
    exported.recompile()
    names = [n.target for n in exported.graph.nodes if n.op == "placeholder"]
    assert names == ["ids", "mask"], "an input that nothing reads is still an input"
    assert sum(n.target is torch.ops.aten.linear.default for n in exported.graph.nodes) == 1, (
        "that of the logits is gone"
    )
    ids, mask = _inputs()
    assert list(exported(ids=ids, mask=mask)) == ["hidden"]


def test_recompile_drops_tensors_without_a_reader(exported):
    set_tensor(exported.module, "spare", torch.ones(3))
    assert "model/spare" not in dict(exported.tensors())
    exported.recompile()
    assert "spare" not in dict(exported.module.named_buffers())


def test_tensors_come_once_and_sorted(exported):
    names = [name for name, _ in exported.tensors()]
    assert names == sorted(set(names))
    assert {"model/table.weight", "model/norm.weight", "model/inner.bias", "model/offset"} <= set(names)


def test_size_counts_each_storage_once(quantized, exported):
    int8, float32 = 6, 4 * (3 + 3 + 3 + 2 + 2)
    assert quantized.size_bytes() == int8 + float32
    tied, norm, inner, offset = 11 * 8, 8 + 8, 8 * 8 + 8, 8
    assert exported.size_bytes() == 4 * (tied + norm + inner + offset)


def test_quantizers_come_in_graph_order(quantized):
    names = [(node.name, quantizer.role) for node, quantizer in quantized.quantizers()]
    assert names == [
        ("x_codes", "linear-input"),
        ("x_values", "linear-input"),
        ("weight", "linear-weight"),
        ("out", "linear-output"),
        ("x_rounded", "residual"),
    ]


def test_an_integer_program_runs(quantized):
    x = torch.tensor([[1.06, -0.3], [100.0, 0.0]])
    rounded = torch.tensor([[1.0, -0.25], [(255 - 100) / 8, 0.0]])  # 1.06 / 0.125 = 8.48, -0.3 / 0.125 = -2.4
    weight = torch.tensor([[-63.5, 1.5], [16.0, 31.75], [2.0, 0.0]])
    results = quantized(x=x)
    torch.testing.assert_close(results["logits"], rounded @ weight.T + torch.tensor([0.5, -0.5, 0.0]))
    scale = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(results["dynamic"], torch.round(x / scale) * scale)


def test_get_and_set_tensor():
    module = fx.GraphModule(nn.Module(), fx.Graph())
    set_tensor(module, "quantizers.add_1.scale", torch.tensor(2.0))
    set_tensor(module, "weight", nn.Parameter(torch.ones(2)))
    assert get_tensor(module, "quantizers.add_1.scale") == 2
    assert dict(module.named_buffers()).keys() == {"quantizers.add_1.scale"}
    assert isinstance(get_tensor(module, "weight"), nn.Parameter)
    set_tensor(module, "weight", torch.zeros(2))
    assert not list(module.parameters())
    set_tensor(module, "weight", nn.Parameter(torch.ones(3)))
    assert get_tensor(module, "weight").shape == (3,)


@pytest.mark.parametrize("target", ["nothing", "quantizers.x.scale", "training", "forward"])
def test_a_missing_tensor_is_named(exported, target):
    with pytest.raises(BitlowerError, match=f"no tensor '{target}'"):
        get_tensor(exported.module, target)


def test_specs_print_name_and_type():
    assert str(ValueSpec("x", TensorType(torch.int64, ("batch", 4)))) == "x: int64[batch, 4]"


EDITS = {
    "level": lambda p: setattr(p, "level", Level.SIMULATED),
    "task": lambda p: setattr(p, "task", "other"),
    "source": lambda p: setattr(p, "source", "elsewhere"),
    "config": lambda p: p.config.update(hidden=1),
    "asset": lambda p: p.assets.update({"vocab.txt": b"a\nc\n"}),
    "asset name": lambda p: p.assets.update({"b": p.assets.pop("vocab.txt")}),
    "passes": lambda p: p.passes.append("clean"),
    "input name": lambda p: setattr(p, "inputs", (ValueSpec("z", p.inputs[0].type), *p.inputs[1:])),
    "output type": lambda p: setattr(
        p, "outputs", (*p.outputs[:1], ValueSpec("logits", p.outputs[1].type.with_dtype(torch.float16)))
    ),
    "tensor value": lambda p: set_tensor(p.module, "offset", torch.nextafter(torch.arange(8.0), torch.tensor(9.0))),
    "tensor dtype": lambda p: set_tensor(p.module, "offset", torch.arange(8.0, dtype=torch.float64)),
    "tensor shape": lambda p: set_tensor(p.module, "offset", torch.arange(8.0).reshape(1, 8)),
    "parameter to buffer": lambda p: set_tensor(p.module, "norm.weight", p.module.norm.weight.detach()),
    "node meta path": lambda p: _call(p).meta.update(path="elsewhere"),
    "node meta type": lambda p: _call(p).meta.update(type=TensorType(torch.int8, ())),
    "node argument": lambda p: setattr(_call(p), "args", (*_call(p).args[:1], (4,), *_call(p).args[2:])),
    "graph name": lambda p: setattr(p, "graphs", {"encoder": p.module}),
}


def _call(program):
    return next(n for n in program.graph.nodes if n.target is torch.ops.aten.layer_norm.default)


@pytest.mark.parametrize("edit", EDITS)
def test_the_digest_sees_every_edit(exported, edit):
    twin = exported.clone()
    assert twin.digest() == exported.digest()
    EDITS[edit](twin)
    assert twin.digest() != exported.digest()


def test_notes_go_with_a_clone_and_change_no_digest(exported):
    noted = replace(exported.clone(), notes=("half-precision weights were widened",))
    assert noted.clone().notes == noted.notes
    assert noted.digest() == exported.digest()


def test_the_digest_sees_quantizers(quantized):
    before = quantized.digest()
    node, quantizer = next(iter(quantized.quantizers()))
    node.meta["quantizer"] = type(quantizer)(quantizer.role, quantizer.spec, "y")
    assert quantized.digest() != before


_SCRIPT = """
import torch
from bitlower.frontends.module import trace_module
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    def forward(self, x):
        return self.b(self.a(x).relu() + x)
torch.manual_seed(0)
program = trace_module(Small(), {"x": torch.ones(2, 3, 4)}, task="custom")
program.config = {"b": 1, "a": {"z": 1, "y": 2}}
print(program.digest(), len(str(program)))
"""


def test_the_digest_is_the_same_in_every_process():
    def start(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, text=True, env=environment)

    first, second = (process.communicate()[0].split() for process in [start("1"), start("2")])
    assert first == second
    assert len(first[0]) == 64


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.bfloat16, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_tensor_digest_is_of_contents_not_of_layout(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    strided = torch.stack([tensor, tensor], dim=-1)[..., 0]
    assert tensor_digest(strided) == tensor_digest(tensor)
    assert tensor_digest(tensor) != tensor_digest(tensor.reshape(1, *shape))
    assert not tensor.numel() or tensor_digest(torch.zeros_like(tensor)) != tensor_digest(tensor)


def test_graphs_have_their_own_text_and_one_signature(exported):
    both = Program({"model": exported.module, "extra": exported.module}, Level.FLOAT, "t", exported.inputs, ())
    assert [line for line in str(both).splitlines() if line.startswith("graph")] == [
        "graph model(ids: int64[batch, sequence], mask: int64[batch, sequence]) -> ():",
        "graph extra:",
    ]
