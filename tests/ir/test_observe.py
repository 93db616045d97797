import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import fx

from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec, set_tensor
from bitlower.ir.observe import observe, stream
from bitlower.ir.storage import spill

KIND = TensorType(torch.float32, ("batch", 4))


def apply(graph: fx.Graph, name: str, x: fx.Node) -> fx.Node:
    return graph.create_node("call_function", getattr(torch.ops.aten, name).default, (x,), name=name)


def chain() -> Program:
    """x → relu → exp → neg, and x → cos beside it; y is not read."""
    graph = fx.Graph()
    x, _ = graph.placeholder("x"), graph.placeholder("y")
    relu = apply(graph, "relu", x)
    exp = apply(graph, "exp", relu)
    cos = apply(graph, "cos", x)
    neg = apply(graph, "neg", exp)
    graph.output((neg, cos))
    for node in graph.nodes:
        node.meta["type"] = KIND
    inputs = (ValueSpec("x", KIND), ValueSpec("y", KIND))
    outputs = (ValueSpec("neg", KIND), ValueSpec("cos", KIND))
    return Program({"model": fx.GraphModule(torch.nn.Module(), graph)}, Level.FLOAT, "custom", inputs, outputs)


def batch(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x}


def test_hands_over_values_in_graph_order_with_their_batch():
    program, seen = chain(), []
    batches = [batch(0), batch(1)]
    observe(program, ["neg", "relu"], batches, lambda node, value, b: seen.append((node, value.clone(), b)))
    assert [node.name for node, _, _ in seen] == ["relu", "neg", "relu", "neg"]
    assert all(node in set(program.graph.nodes) for node, _, _ in seen)
    for (_, relu, b), (_, neg, _), given in zip(seen[::2], seen[1::2], batches, strict=True):
        assert b is given
        torch.testing.assert_close(relu, given["x"].clamp(min=0), rtol=0, atol=0)
        torch.testing.assert_close(neg, -torch.exp(given["x"].clamp(min=0)), rtol=0, atol=0)


def test_computes_only_what_the_watched_nodes_need(monkeypatch):
    ran = []
    original = fx.Interpreter.call_function
    monkeypatch.setattr(fx.Interpreter, "call_function", lambda s, t, a, k: ran.append(str(t)) or original(s, t, a, k))
    observe(chain(), ["exp"], [batch(0)], lambda *_: None)
    assert ran == ["aten.relu.default", "aten.exp.default"]


def test_values_are_freed_after_their_last_use():
    alive = {}

    def look(node: fx.Node, value: torch.Tensor, _: object) -> None:
        if node.name == "neg":
            assert alive["relu"]() is None
        alive[node.name] = weakref.ref(value)

    observe(chain(), ["relu", "cos", "neg"], [batch(0)], look)
    assert all(reference() is None for reference in alive.values())


def test_runs_without_gradients():
    x = batch(0)
    x["x"].requires_grad_()
    seen = []
    observe(chain(), ["exp"], [x], lambda node, value, b: seen.append(value.requires_grad))
    assert seen == [False]


def test_placeholders_can_be_watched_and_batches_may_be_a_generator():
    seen = []
    observe(chain(), ["y"], (batch(i) for i in range(3)), lambda node, value, b: seen.append(value is b["y"]))
    assert seen == [True] * 3


def test_nothing_watched_runs_nothing():
    observe(chain(), [], iter(lambda: pytest.fail("a batch was read"), None), lambda *_: None)


def test_progress_is_shown_by_the_given_display():
    labels = []

    def track(items, label):
        labels.append(label)
        yield from items

    observe(chain(), ["exp"], [batch(0)], lambda *_: None, track=track, label="calibrating")
    assert labels == ["calibrating"]


def test_unknown_and_foreign_nodes_are_named():
    with pytest.raises(BitlowerError, match=r"%rellu; did you mean 'relu'"):
        observe(chain(), ["rellu"], [batch(0)], lambda *_: None)
    foreign = next(iter(chain().graph.nodes))
    with pytest.raises(BitlowerError, match="no node %x"):
        observe(chain(), [foreign], [batch(0)], lambda *_: None)


def test_a_batch_without_an_input_is_refused():
    with pytest.raises(BitlowerError, match="'y' is missing"):
        observe(chain(), ["exp"], [{"x": torch.zeros(1, 4)}], lambda *_: None)


def test_an_error_on_the_way_keeps_its_text_and_says_which_node():
    def fail(*_):
        raise BitlowerError("NaN in the data", hint="clean it")

    with pytest.raises(BitlowerError, match="NaN in the data; clean it") as caught:
        observe(chain(), ["exp"], [batch(0)], fail)
    assert str(caught.value) == "NaN in the data; clean it"
    assert "%exp" in caught.value.__notes__[0]


def test_what_the_callback_returns_takes_the_place_of_the_value():
    seen = {}

    def force(node: fx.Node, value: torch.Tensor, _: object) -> torch.Tensor | None:
        seen[node.name] = value.clone()
        return torch.zeros(2, 4) if node.name == "relu" else None

    observe(chain(), ["relu", "neg"], [batch(0)], force)
    assert seen["relu"].any()
    torch.testing.assert_close(seen["neg"], -torch.ones(2, 4), rtol=0, atol=0)


def test_what_needs_no_input_has_its_turn_when_it_is_read():
    """x + exp(a) + exp(b), with both exponentials at the front of the graph."""
    graph, module = fx.Graph(), torch.nn.Module()
    x = graph.placeholder("x")
    module.a, module.b = (torch.nn.Parameter(torch.full((4,), value)) for value in (0.0, 1.0))
    exps = [graph.create_node("call_function", torch.ops.aten.exp.default, (graph.get_attr(n),)) for n in ("a", "b")]
    sums = [x]
    for exp in exps:
        sums.append(graph.call_function(torch.ops.aten.add.Tensor, (sums[-1], exp)))
    graph.output((sums[-1],))
    for node in graph.nodes:
        node.meta["type"] = KIND
    specs = (ValueSpec("x", KIND),), (ValueSpec("y", KIND),)
    program = Program({"model": fx.GraphModule(module, graph)}, Level.FLOAT, "custom", *specs)
    seen: list[str] = []
    inputs = {"x": batch(0)["x"]}
    observe(program, [*exps, *sums[1:]], [inputs], lambda node, value, _: seen.append(node.name))
    assert seen == [exps[0].name, sums[1].name, exps[1].name, sums[2].name]
    found: list[torch.Tensor] = []
    observe(program, [exps[1], x], [inputs], lambda node, value, _: found.append(value))
    torch.testing.assert_close(found, [inputs["x"], torch.full((4,), math.e)])


def test_a_stream_gives_values_while_the_run_goes_on(monkeypatch):
    ran = []
    original = fx.Interpreter.call_function
    monkeypatch.setattr(fx.Interpreter, "call_function", lambda s, t, a, k: ran.append(str(t)) or original(s, t, a, k))
    given = batch(0)
    values = stream(chain(), ["relu", "neg"], given)
    node, relu = next(values)
    assert (node.name, ran) == ("relu", ["aten.relu.default"])
    torch.testing.assert_close(relu, given["x"].clamp(min=0), rtol=0, atol=0)
    alive = weakref.ref(relu)
    del relu
    node, neg = next(values)
    assert (node.name, alive()) == ("neg", None)
    torch.testing.assert_close(neg, -torch.exp(given["x"].clamp(min=0)), rtol=0, atol=0)
    assert not neg.requires_grad
    assert next(values, None) is None


def test_a_stream_names_unknown_nodes():
    with pytest.raises(BitlowerError, match=r"%rellu; did you mean 'relu'"):
        next(stream(chain(), ["rellu"], batch(0)))


def test_what_a_callback_gives_back_takes_the_place_of_a_value():
    seen = []

    def look(node: fx.Node, value: torch.Tensor, _: object) -> torch.Tensor | None:
        seen.append(value.clone())
        return torch.full_like(value, 3.0) if node.name == "relu" else None

    observe(chain(), ["relu", "neg"], [batch(0)], look)
    torch.testing.assert_close(seen[1], torch.full((2, 4), -math.exp(3.0)))


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the file behind ``tensor`` that the kernel counts as this process's memory."""
    address, size, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= address < last
        elif inside and head == "Rss:":
            size += 1024 * int(line.split()[1])
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's view of memory")
def test_a_weight_in_a_file_goes_after_its_last_slice_is_read():
    """Its pages come when a product reads the slice, not when the slice is taken."""
    graph, module, size = fx.Graph(), torch.nn.Module(), 1024
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    module.register_buffer("w", spill(weight))
    x, whole = graph.placeholder("x"), graph.get_attr("w")
    halves = [(x, 0, size // 2), (whole, 0, size // 2), (x, size // 2, size), (whole, size // 2, size)]
    parts = [graph.call_function(torch.ops.aten.slice.Tensor, (value, 1, *ends)) for value, *ends in halves]
    products = [graph.call_function(torch.ops.aten.linear.default, tuple(parts[i : i + 2])) for i in (0, 2)]
    total = graph.call_function(torch.ops.aten.add.Tensor, tuple(products))
    doubled = graph.call_function(torch.ops.aten.add.Tensor, (total, total))
    graph.output((doubled,))
    kind = TensorType(torch.float32, ("batch", size))
    program = Program(
        {"model": fx.GraphModule(module, graph)},
        Level.FLOAT,
        "custom",
        (ValueSpec("x", kind),),
        (ValueSpec("y", kind),),
    )
    inputs, held = torch.randn(3, size, generator=torch.Generator().manual_seed(1)), {}

    def look(node: fx.Node, value: torch.Tensor, _: object) -> None:
        held[node] = resident(program.module.w), value

    observe(program, [*products, total], [{"x": inputs}], look)
    assert held[products[0]][0] >= 4 * size * size // 2
    assert held[total][0] == 0
    expected = inputs.double() @ weight.double().T
    torch.testing.assert_close(held[total][1].double(), expected, rtol=0, atol=1e-3)


def doubling(monkeypatch: pytest.MonkeyPatch) -> tuple[Program, list[str]]:
    """x · exp(w), and the operators that run."""
    graph, module, ran = fx.Graph(), torch.nn.Module(), list[str]()
    module.register_buffer("w", torch.arange(4.0))
    x, w = graph.placeholder("x"), graph.get_attr("w")
    exp = apply(graph, "exp", w)
    product = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (x, exp), name="product")
    graph.output((product,))
    for node in graph.nodes:
        node.meta["type"] = KIND
    specs = (ValueSpec("x", KIND),), (ValueSpec("y", KIND),)
    original = fx.Interpreter.call_function
    monkeypatch.setattr(fx.Interpreter, "call_function", lambda s, t, a, k: ran.append(str(t)) or original(s, t, a, k))
    return Program({"model": fx.GraphModule(module, graph)}, Level.FLOAT, "custom", *specs), ran


EXP = "aten.exp.default"
INPUTS = [{"x": batch(seed)["x"]} for seed in range(3)]


def test_what_depends_on_parameters_alone_is_computed_once_for_all_batches(monkeypatch):
    program, ran = doubling(monkeypatch)
    seen = []
    observe(program, ["product"], INPUTS, lambda node, value, _: seen.append(value))
    assert ran.count(EXP) == 1
    torch.testing.assert_close(seen, [part["x"] * torch.arange(4.0).exp() for part in INPUTS], rtol=0, atol=0)


def test_a_parameter_that_changes_between_batches_counts_from_then_on(monkeypatch):
    program, ran = doubling(monkeypatch)
    changes = [lambda: program.module.w.add_(1), lambda: set_tensor(program.module, "w", torch.ones(4)), lambda: None]
    seen = []

    def change(node: fx.Node, value: torch.Tensor, _: object) -> None:
        seen.append(value)
        changes[len(seen) - 1]()

    observe(program, ["product"], INPUTS, change)
    weights = [torch.arange(4.0), torch.arange(4.0) + 1, torch.ones(4)]
    expected = [part["x"] * weight.exp() for part, weight in zip(INPUTS, weights, strict=True)]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert ran.count(EXP) == 3


def test_what_a_callback_replaces_is_shown_for_every_batch(monkeypatch):
    program, _ = doubling(monkeypatch)
    seen, steps = [], iter(range(3))

    def replace(node: fx.Node, value: torch.Tensor, _: object) -> torch.Tensor | None:
        if node.name == "exp":
            return torch.full_like(value, float(next(steps)))
        seen.append(value)
        return None

    observe(program, ["exp", "product"], INPUTS, replace)
    torch.testing.assert_close(seen, [part["x"] * factor for factor, part in enumerate(INPUTS)], rtol=0, atol=0)


def test_no_more_than_the_bound_is_held_for_the_next_batch(monkeypatch):
    program, ran = doubling(monkeypatch)
    monkeypatch.setattr("bitlower.ir.observe.REUSED_BYTES", 15)
    observe(program, ["product"], INPUTS, lambda *_: None)
    assert ran.count(EXP) == 3
    ran.clear()
    monkeypatch.setattr("bitlower.ir.observe.REUSED_BYTES", 16)
    observe(program, ["product"], INPUTS, lambda *_: None)
    assert ran.count(EXP) == 1
    ran.clear()
    observe(program, ["product"], iter(INPUTS), lambda *_: None)
    assert ran.count(EXP) == 3
