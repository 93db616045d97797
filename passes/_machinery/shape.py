"""What every Program is made of, checked before anything looks into one that a pass gave."""

from __future__ import annotations

import json
from typing import Any

from torch import fx

from bitlower.ir import BitlowerError, Level, Program, ValueSpec, get_tensor


def shape_problem(program: Program, before: Program) -> str:
    """What ``program``, which a pass made of ``before``, lacks to be a Program at all; empty if nothing.

    Its fields have their types, the graphs are those that were there, each with one output and tensors where the graph
    reads some, and the model takes and returns values of the same names as before.
    """
    return _field_problem(program) or _graph_problem(program, before) or _signature_problem(program, before)


def _field_problem(program: Program) -> str:
    if not isinstance(program.graphs, dict):
        return f"its graphs are {_kind(program.graphs)}, not a dictionary"
    kinds = {"level": Level, "task": str, "source": str, "inputs": tuple, "outputs": tuple, "transposed": tuple}
    kinds |= {"config": dict, "assets": dict, "passes": list}
    for name, kind in kinds.items():
        if not isinstance(getattr(program, name), kind):
            return f"its {name} is {_kind(getattr(program, name))}, not {kind.__name__}"
    for name in ("inputs", "outputs"):
        if not all(isinstance(spec, ValueSpec) for spec in getattr(program, name)):
            return f"its {name} are not all of type ValueSpec"
    if not all(isinstance(k, str) and isinstance(v, bytes) for k, v in program.assets.items()):
        return "its assets are not bytes by name"
    try:
        json.dumps(program.config)
    except (TypeError, ValueError, RecursionError) as error:
        return f"its config is no plain data ({error})"
    return ""


def _graph_problem(program: Program, before: Program) -> str:
    for name in before.graphs:
        if name not in program.graphs:
            return f"its graph {name!r} is gone"
    for name, module in program.graphs.items():
        if not isinstance(module, fx.GraphModule):
            return f"its graph {name!r} is {_kind(module)}, not a GraphModule"
        if len(list(module.graph.find_nodes(op="output"))) != 1:
            return f"its graph {name!r} has not one output node"
        for node in module.graph.find_nodes(op="get_attr"):
            try:
                get_tensor(module, str(node.target))
            except BitlowerError:
                return f"%{node.name} reads {node.target!r}, which is no tensor"
    return ""


def _signature_problem(program: Program, before: Program) -> str:
    for name in ("inputs", "outputs"):
        had, has = ([spec.name for spec in getattr(p, name)] for p in (before, program))
        if had != has:
            return f"its {name} are {', '.join(has) or 'none'}, not {', '.join(had)}"
    return ""


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"
