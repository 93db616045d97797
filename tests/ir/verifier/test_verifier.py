import operator

import pytest
import torch
from torch import fx

from bitlower.ir import (
    CheckError,
    Granularity,
    Grid,
    Level,
    Program,
    Quantizer,
    QuantSpec,
    TensorType,
    ValueSpec,
    get_tensor,
    ops,
    set_tensor,
)
from bitlower.ir.quantization import numerics
from bitlower.ir.verifier import verify

aten = torch.ops.aten
X = TensorType(torch.float32, ("batch", 4))
Y = TensorType(torch.float32, ("batch", 6))
WEIGHT = QuantSpec(Grid(4), Granularity.per_channel(0))
STATIC = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
DYNAMIC = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_token())
WHERE = {"path": "encoder.dense", "source": "model.py:7: self.dense(x)"}


class Builder:
    """``y = linear(relu(x), weight)`` at one of three levels, built by hand so that nothing under test builds it."""

    def __init__(self, level: Level, activation: QuantSpec = STATIC) -> None:
        self.level, self.activation = level, activation
        self.module, self.graph = fx.GraphModule(torch.nn.Module(), fx.Graph()), fx.Graph()
        weight = torch.arange(24.0).reshape(6, 4) - 11.5
        set_tensor(self.module, "dense.weight", torch.nn.Parameter(weight))
        x = self.graph.placeholder("x")
        x.meta["type"] = X
        relu = self.call(aten.relu.default, (x,), X, "relu")
        w = self.attribute("dense.weight", "weight")
        if level is not Level.FLOAT:
            w, relu = self.weight(w), self.rounded(relu)
        linear = self.call(aten.linear.default, (relu, w), Y, "linear")
        self.graph.output((linear,))

    def call(self, target, args, kind, name, quantizer=None):
        node = self.graph.create_node("call_function", target, args, name=name)
        node.meta = dict(WHERE) | ({"type": kind} if kind else {}) | ({"quantizer": quantizer} if quantizer else {})
        return node

    def attribute(self, target, name):
        node = self.graph.create_node("get_attr", target, name=name)
        tensor = get_tensor(self.module, target)
        node.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))
        return node

    def range(self, name, scale, zero):
        set_tensor(self.module, f"quantizers.{name}.scale", scale)
        set_tensor(self.module, f"quantizers.{name}.zero_point", zero)
        return [self.attribute(f"quantizers.{name}.{part}", f"{name}_{part}") for part in ("scale", "zero_point")]

    def weight(self, w):
        tensor, grid = get_tensor(self.module, "dense.weight").detach(), WEIGHT.grid
        scale, zero = grid.qparams(*WEIGHT.granularity.range_of(tensor))
        pair, quantizer = self.range("weight", scale, zero), Quantizer("linear-weight", WEIGHT, "dense.weight")
        kind = w.meta["type"]
        if self.level is Level.SIMULATED:
            args = (w, *pair, grid.quant_min, grid.quant_max)
            return self.call(ops.fake_quantize, args, kind, "weight_quantized", quantizer)
        codes = numerics.codes(tensor, scale, zero, grid.quant_min, grid.quant_max).to(torch.int8)
        set_tensor(self.module, "dense.weight_codes", codes)
        return self.call(
            ops.dequantize, (self.attribute("dense.weight_codes", "codes"), *pair), kind, "real", quantizer
        )

    def rounded(self, x):
        grid, quantizer = self.activation.grid, Quantizer("linear-input", self.activation, "relu")
        if self.activation is DYNAMIC:
            chooser = self.call(ops.choose_qparams, (x, 8, False, False, False, "qmax"), None, "chooser")
            kind = TensorType(torch.float32, ("batch", 1))
            pair = [self.call(operator.getitem, (chooser, i), kind, f"part_{i}") for i in (0, 1)]
        else:
            pair = self.range("relu", torch.tensor(0.5), torch.tensor(3.0))
        args = (x, *pair, grid.quant_min, grid.quant_max)
        if self.level is Level.SIMULATED:
            return self.call(ops.fake_quantize, args, X, "relu_quantized", quantizer)
        codes = self.call(ops.quantize, (*args, "uint8"), X.with_dtype(torch.uint8), "relu_codes", quantizer)
        return self.call(ops.dequantize, (codes, *pair), X, "relu_real", quantizer)

    def program(self) -> Program:
        graphs = {"model": fx.GraphModule(self.module, self.graph)}
        return Program(graphs, self.level, "custom", (ValueSpec("x", X),), (ValueSpec("y", Y),))


def build(level: Level, activation: QuantSpec = STATIC) -> Program:
    return Builder(level, activation).program()


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("activation", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_sound_programs_pass_and_run(level, activation):
    program = build(level, activation)
    verify(program)
    assert program(x=torch.randn(3, 4))["y"].shape == (3, 6)


def foreign_function(x):
    return x


def set_arg(program, name, index, value):
    n = node(program, name)
    n.args = (*n.args[:index], value, *n.args[index + 1 :])


def add_before_output(program, target, args, kind=X, name="extra", **meta):
    with program.graph.inserting_before(program.graph.output_node()):
        new = program.graph.create_node("call_function", target, args, name=name)
    new.meta = {"type": kind, **meta}
    return new


def buffer(program, target, value):
    set_tensor(program.module, target, value)


def set_quantizer(program, name, role="linear-input", spec=STATIC):
    node(program, name).meta["quantizer"] = Quantizer(role, spec, "relu")


def poison(program, value):
    get_tensor(program.module, "dense.weight").data[2, 1] = value


def read_in_wrong_order(program):
    """The output of relu is read before it is computed."""
    node(program, "linear").append(node(program, "relu"))


def call_of(kind):
    def edit(program):
        with program.graph.inserting_before(program.graph.output_node()):
            program.module.add_submodule("inner", torch.nn.Identity())
            program.graph.create_node(kind, "inner", (node(program, "relu"),), name="extra")

    return edit


def round_twice(program):
    n = node(program, "relu_quantized")
    with program.graph.inserting_after(n):
        view = program.graph.create_node("call_function", aten.view.default, (n, [-1, 4]), name="view")
    with program.graph.inserting_after(view):
        again = program.graph.create_node("call_function", ops.fake_quantize, (view, *n.args[1:]), name="again")
    view.meta, again.meta = {"type": X}, dict(n.meta)
    set_arg(program, "linear", 0, again)


def other_range(program):
    """Quantize with one scale, dequantize with another of the same value: only the name tells."""
    buffer(program, "quantizers.other.scale", torch.tensor(0.5))
    with program.graph.inserting_before(node(program, "relu_real")):
        other = program.graph.create_node("get_attr", "quantizers.other.scale", name="other")
    set_arg(program, "relu_real", 1, other)


def same_range_by_another_node(program):
    """A second get_attr node of the same tensor is the same range."""
    with program.graph.inserting_before(node(program, "relu_real")):
        again = program.graph.create_node("get_attr", "quantizers.relu.scale", name="again")
    set_arg(program, "relu_real", 1, again)


def chosen_for_another_value(program):
    chooser = node(program, "chooser")
    chooser.args = (node(program, "x"), *chooser.args[1:])


FLOAT_FAULTS = {
    "output before its operand": (read_in_wrong_order, "the graph is not sound"),
    "missing tensor": (lambda p: delattr(p.module.dense, "weight"), "weight"),
    "not a tensor": (
        lambda p: (delattr(p.module.dense, "weight"), setattr(p.module.dense, "weight", 3)),
        "%weight (get_attr dense.weight): the program has no tensor 'dense.weight'",
    ),
    "attribute of another shape": (
        lambda p: node(p, "weight").meta.update(type=X),
        "%weight (get_attr dense.weight): is of type float32[batch, 4], the tensor is float32[6, 4]",
    ),
    "input of another name": (lambda p: setattr(p, "inputs", (ValueSpec("z", X),)), "takes (x), the program says (z)"),
    "input too many": (lambda p: setattr(p, "inputs", p.inputs * 2), "takes (x), the program says (x, x)"),
    "input of another type": (
        lambda p: setattr(p, "inputs", (ValueSpec("x", X.with_dtype(torch.int64)),)),
        "%x (placeholder x): is of type float32[batch, 4], the program says x: int64[batch, 4]",
    ),
    "output too many": (lambda p: setattr(p, "outputs", p.outputs * 2), "gives 1 values, the program says 2 outputs"),
    "no tuple": (lambda p: setattr(p.graph.output_node(), "args", (node(p, "linear"),)), "no tuple of outputs"),
    "constant output": (lambda p: setattr(p.graph.output_node(), "args", ((3,),)), "output 'y' is 3"),
    "output of another rank": (
        lambda p: setattr(p, "outputs", (ValueSpec("y", TensorType(torch.float32, (6,))),)),
        "%linear (call_function linear.default) in encoder.dense at model.py:7: self.dense(x): is of type",
    ),
    "method call": (call_of("call_method"), "%extra (call_method inner): a Program holds no call_method"),
    "module call": (call_of("call_module"), "%extra (call_module inner): a Program holds no call_module"),
    "python function": (lambda p: add_before_output(p, foreign_function, (1,)), "calls a function that is no operator"),
    "no type": (lambda p: node(p, "relu").meta.pop("type"), "self.dense(x): has no type"),
    "input without type": (lambda p: node(p, "x").meta.pop("type"), "%x (placeholder x): has no type"),
    "type of another kind": (lambda p: node(p, "relu").meta.update(type=(2, 3)), "its type (2, 3) is none"),
    "negative dimension": (
        lambda p: node(p, "relu").meta.update(type=TensorType(torch.float32, (-1, 4))),
        "is none",
    ),
    "path that is no text": (lambda p: node(p, "relu").meta.update(path=["a"]), "%relu: its meta 'path' is ['a']"),
    "source that is no text": (lambda p: node(p, "relu").meta.update(source=7), "%relu: its meta 'source' is 7"),
    "quantizer at level float": (
        lambda p: add_before_output(p, ops.fake_quantize, (node(p, "relu"),) * 3),
        "%extra (call_function fake_quantize.default): does not belong into a program at level float",
    ),
    "quantizer on an operator": (lambda p: set_quantizer(p, "relu"), "carries a quantizer but is none"),
    "NaN in a weight": (lambda p: poison(p, float("nan")), "the tensor 'dense.weight' holds NaN or Inf"),
    "Inf in a weight": (lambda p: poison(p, float("-inf")), "the tensor 'dense.weight' holds NaN or Inf"),
}

SIMULATED_FAULTS = {
    "integer operator": (
        lambda p: add_before_output(p, ops.dequantize, (node(p, "relu"),) * 3),
        "does not belong into a program at level simulated",
    ),
    "nameless quantizer": (lambda p: node(p, "relu_quantized").meta.pop("quantizer"), "does not say which"),
    "unknown role": (
        lambda p: set_quantizer(p, "relu_quantized", "norms"),
        "unknown role 'norms'; did you mean 'norm'",
    ),
    "clamps elsewhere": (lambda p: set_arg(p, "relu_quantized", 4, 127), "clamps to [0, 127], the grid u8 asymmetric"),
    "clamps to another grid": (
        lambda p: set_quantizer(p, "relu_quantized", spec=QuantSpec(Grid(8), Granularity.per_tensor())),
        "clamps to [0, 255], the grid s8 is [-128, 127]",
    ),
    "another type": (
        lambda p: node(p, "relu_quantized").meta.update(type=X.with_dtype(torch.float64)),
        "is of type float64[batch, 4], its input makes it float32[batch, 4]",
    ),
    "another shape": (lambda p: node(p, "relu_quantized").meta.update(type=Y), "is of type float32[batch, 6]"),
    "scale of another shape": (
        lambda p: buffer(p, "quantizers.relu.scale", torch.ones(4)),
        "%relu_scale (get_attr quantizers.relu.scale): is of type float32[], the tensor is float32[4]",
    ),
    "per-tensor scale for channels": (
        lambda p: (
            set_arg(p, "weight_quantized", 1, node(p, "weight_quantized").args[2].prev.prev)
            or set_quantizer(p, "weight_quantized", "linear-weight", QuantSpec(Grid(4), Granularity.per_channel(1)))
        ),
        "per-channel(1) of float32[6, 4] takes float32[1, 4]",
    ),
    "granularity that does not divide": (
        lambda p: set_quantizer(p, "weight_quantized", "linear-weight", QuantSpec(Grid(4), Granularity.per_group(3))),
        "per-group(3) and an axis of 4 have only blocks of 1 in common",
    ),
    "scale on a symbolic axis": (
        lambda p: set_quantizer(p, "relu_quantized", spec=QuantSpec(STATIC.grid, Granularity.per_channel(0))),
        "axis 0 has the symbolic size 'batch'",
    ),
    "computed static scale": (
        lambda p: set_arg(p, "relu_quantized", 1, node(p, "relu")),
        "its scale is %relu, per-tensor scales are stored tensors",
    ),
    "number for a scale": (lambda p: set_arg(p, "relu_quantized", 1, 0.5), "are not values of the graph"),
    "number for a value": (lambda p: set_arg(p, "relu_quantized", 0, 0.5), "its first argument is 0.5"),
    "NaN scale": (lambda p: buffer(p, "quantizers.relu.scale", torch.tensor(float("nan"))), "negative or not finite"),
    "negative scale": (lambda p: buffer(p, "quantizers.relu.scale", torch.tensor(-0.1)), "negative or not finite"),
    "a scale of zero": (
        lambda p: get_tensor(p.module, "quantizers.weight.scale")[2].zero_(),
        "%weight_quantized (call_function fake_quantize.default) in encoder.dense at model.py:7: "
        "self.dense(x): has a scale of zero",
    ),
    "fractional zero point": (
        lambda p: buffer(p, "quantizers.relu.zero_point", torch.tensor(2.5)),
        "no whole number",
    ),
    "NaN zero point": (
        lambda p: buffer(p, "quantizers.relu.zero_point", torch.tensor(float("nan"))),
        "no whole number",
    ),
    "zero point off the grid": (
        lambda p: buffer(p, "quantizers.relu.zero_point", torch.tensor(256.0)),
        "zero point outside [0, 255]",
    ),
    "zero point of a symmetric grid": (
        lambda p: get_tensor(p.module, "quantizers.weight.zero_point")[1].fill_(1.0),
        "zero point outside [0, 0]",
    ),
    "rounded twice": (round_twice, "rounds a value that %relu_quantized has rounded already"),
}

DYNAMIC_FAULTS = {
    "stored scale": (
        lambda p: set_arg(p, "relu_quantized", 1, node(p, "weight_scale")),
        "its scale is %weight_scale, per-token scales come from choose_qparams",
    ),
    "parts exchanged": (lambda p: set_arg(p, "part_0", 1, 1), "its scale and zero point are not both from %chooser"),
    "another grid": (lambda p: set_arg(p, "chooser", 1, 4), "chooses for [4, False, False, False, 'qmax'], the grid"),
    "another value": (chosen_for_another_value, "rounds %relu with a scale chosen for %x"),
    "part without a type": (lambda p: node(p, "part_0").meta.pop("type"), "%part_0 (call_function getitem)"),
}

INTEGER_FAULTS = {
    "fake quantization": (
        lambda p: add_before_output(p, ops.fake_quantize, (node(p, "relu"),) * 3),
        "does not belong into a program at level integer",
    ),
    "no scale": (lambda p: buffer(p, "quantizers.relu.scale", torch.tensor(0.0)), "scale of zero; run `calibrate`"),
    "codes read as numbers": (
        lambda p: set_arg(p, "linear", 0, node(p, "relu_codes")),
        "reads the codes of %relu_codes; only dequantize may",
    ),
    "another range": (other_range, "%relu_real (call_function dequantize.default) in encoder.dense"),
    "another spec": (lambda p: set_quantizer(p, "relu_real", "norm"), "is Quantizer(role='norm'"),
    "another dtype": (lambda p: set_arg(p, "relu_codes", 5, "int8"), "gives ['int8'], the grid u8 asymmetric is held"),
    "quantize of the values' type": (lambda p: node(p, "relu_codes").meta.update(type=X), "its input makes it uint8"),
    "dequantize of floats": (
        lambda p: (
            set_arg(p, "relu_real", 0, node(p, "relu")),
            p.graph.erase_node(node(p, "relu_codes")),
        ),
        "reads %relu, which holds no codes",
    ),
    "codes of another dtype": (
        lambda p: (
            buffer(p, "dense.weight_codes", get_tensor(p.module, "dense.weight_codes").short()),
            node(p, "codes").meta.pop("type"),
        ),
        "the codes 'dense.weight_codes' are torch.int16, the grid s4 is held in torch.int8",
    ),
    "codes off the grid": (
        lambda p: get_tensor(p.module, "dense.weight_codes")[0, 0].fill_(8),
        "outside the grid s4",
    ),
    "double rounding": (
        lambda p: (
            set_arg(p, "relu_codes", 0, node(p, "real"))
            or node(p, "relu_codes").meta.update(type=TensorType(torch.uint8, (6, 4)))
        ),
        "rounds a value that %real has rounded already",
    ),
}


def cases():
    for level, activation, faults in (
        (Level.FLOAT, STATIC, FLOAT_FAULTS),
        (Level.SIMULATED, STATIC, SIMULATED_FAULTS),
        (Level.SIMULATED, DYNAMIC, DYNAMIC_FAULTS),
        (Level.INTEGER, STATIC, INTEGER_FAULTS),
    ):
        for name, (fault, message) in faults.items():
            yield pytest.param(level, activation, fault, message, id=f"{level}: {name}")


@pytest.mark.parametrize(("level", "activation", "fault", "message"), list(cases()))
def test_each_fault_is_found_and_named(level, activation, fault, message):
    program = build(level, activation)
    fault(program)
    with pytest.raises(CheckError) as caught:
        verify(program)
    assert message in str(caught.value)


def test_a_name_that_two_nodes_have_is_found():
    program = build(Level.FLOAT)
    node(program, "linear").name = "relu"
    with pytest.raises(CheckError, match="another node has this name"):
        verify(program)


def test_an_uncalibrated_quantizer_passes_at_level_simulated():
    program = build(Level.SIMULATED)
    node(program, "relu_quantized").kwargs = {"calibrated": False}
    buffer(program, "quantizers.relu.scale", torch.tensor(0.0))
    buffer(program, "quantizers.relu.zero_point", torch.tensor(0.0))
    verify(program)


def test_a_range_is_the_same_by_any_node_that_names_it():
    program = build(Level.INTEGER)
    same_range_by_another_node(program)
    verify(program)


def test_finite_weights_whose_squares_overflow_pass():
    program = build(Level.FLOAT)
    poison(program, 3e38)
    verify(program)
