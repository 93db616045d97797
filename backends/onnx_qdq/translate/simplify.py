"""What translations leave behind is folded: constants, sizes, orders of axes, equal nodes."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.version_converter
from onnx_ir.passes import common
from onnxscript.rewriter import onnx_fusions

from bitlower.backends.onnx_qdq.graph.nodes import is_op, source


def simplify(model: ir.Model, opset: int) -> None:
    """Bring all to ``opset``, fold constants and what onnxscript knows as one operator, and let equal nodes be one.

    Large tensors are to be inputs of the graph here, or they are copied.
    """
    onnxscript.version_converter.convert_version(model, opset)
    onnxscript.optimizer.fold_constants(model)
    for node in list(model.graph):
        same = _same(node)
        if same is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], same, replace_graph_outputs=True)
    onnx_fusions.fuse(model)
    for one in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.ShapeInferencePass(),
    ):
        one(model)


def _same(node: ir.Node) -> ir.Value | None:
    """The value that ``node`` returns as it is: axes that keep their order, a size that is taken apart and put back."""
    if is_op(node, "Transpose"):
        order = list(node.attributes["perm"].as_ints())
        return source(node) if order == sorted(order) else None
    squeeze = source(node).producer() if is_op(node, "Reshape") else None
    if squeeze is None or not is_op(squeeze, "Squeeze") or not is_op(source(squeeze).producer(), "Shape"):
        return None
    shape = ir.convenience.get_const_tensor(source(node, 1))
    return source(squeeze) if shape is not None and shape.numpy().tolist() == [-1] else None
