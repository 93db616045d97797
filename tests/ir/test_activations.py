"""The table of activation functions: every row is known to all that read it."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from bitlower.backends.tvm_kernels.spec.base import ACTIVATION_FUNCTIONS
from bitlower.ir.activations import ACTIVATIONS, IN_KERNELS, Activation, activation_of
from bitlower.ir.dataflow import ACTIVATION

NAMED = [row for row in ACTIVATIONS if row.name]
apply_reference = runpy.run_path(str(Path(__file__).parents[1] / "backends/tvm_kernels/reference.py"))["apply"]
POINTS = torch.linspace(-9, 9, 301, dtype=torch.float64)


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_the_function_is_what_the_operator_computes(row: Activation) -> None:
    assert row.function is not None
    assert torch.equal(row.function(POINTS), row.target(POINTS, **row.options))


@pytest.mark.parametrize("name", IN_KERNELS)
def test_every_name_has_an_expression_and_a_reference_written_out(name: str) -> None:
    expected = IN_KERNELS[name](POINTS).numpy()
    np.testing.assert_allclose(apply_reference(name, POINTS.numpy()), expected, rtol=1e-12, atol=1e-12)
    pytest.importorskip("tvm")
    from tvm import tirx

    from bitlower.backends.tvm_kernels.tir.expressions import apply

    assert apply(name, tirx.Var("x", "float32")) is not None


def test_what_has_no_expression_is_no_identity() -> None:
    with pytest.raises(ValueError, match=r"see docs/operators\.md"):
        apply_reference("softplus", POINTS.numpy())


def test_the_lists_follow_from_the_table() -> None:
    assert {row.target for row in ACTIVATIONS} == ACTIVATION
    assert ("", *IN_KERNELS) == ACTIVATION_FUNCTIONS
    assert len({(row.target, *sorted(row.options.items())) for row in ACTIVATIONS}) == len(ACTIVATIONS)


def call(target: object, *more: object, **options: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *more), options)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ACTIVATIONS, ids=lambda row: row.name or str(row.target))
def test_a_node_is_known_by_its_operator_and_options(row: Activation) -> None:
    assert activation_of(call(row.target, **row.options)) is row


def test_other_nodes_are_none() -> None:
    gelu = torch.ops.aten.gelu.default
    found = activation_of(call(gelu, approximate="none"))
    assert found is not None
    assert found.name == "gelu"
    assert activation_of(call(gelu, approximate="erf")) is None
    assert activation_of(call(torch.ops.aten.elu.default, 2.0)) is None
    assert activation_of(call(torch.ops.aten.neg.default)) is None
    assert activation_of(None) is None
