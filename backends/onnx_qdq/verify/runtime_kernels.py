"""What onnxruntime really runs: integer kernels in its optimized graph against those that the Program calls for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
from torch import fx

from bitlower.backends.onnx_qdq.encoding.nbits import FLOAT_ACTIVATIONS, ROUNDS_ACTIVATIONS, Container, container
from bitlower.backends.onnx_qdq.graph.code_operators import integer_operators
from bitlower.backends.onnx_qdq.graph.structure import is_view
from bitlower.backends.onnx_qdq.runtime.session import Session, read_model
from bitlower.backends.onnx_qdq.translate.operands import FLOAT_OPERANDS, float_reason, unviewed
from bitlower.backends.onnx_qdq.translate.unfold import conv_reason
from bitlower.ir import CheckError, Program, Quantizer, get_tensor, ops
from bitlower.ir.dataflow import CONVOLUTION, LINEAR, MATMUL
from bitlower.ir.operators import BinaryNode, LinearNode
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.scratch import scratch_folder

FUSED = frozenset({"DynamicQuantizeMatMul", "QGemm", "QLinearConv", "ConvInteger", "QAttention"})
"""Integer kernels that the runtime makes of operators of the file."""
FLOAT = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "Attention", "MultiHeadAttention"})
ATTENTIONS = frozenset({"Attention", "MultiHeadAttention"})
NBITS = "MatMulNBits"
LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"
"""The session configuration entry for the accuracy level of what onnxruntime makes of DequantizeLinear and MatMul."""
_GROUPED = "per-embedding-"
"""How the granularities of groups along the embedding begin in reasons."""


@dataclass(frozen=True)
class KernelReport:
    """The multiplications of a model, as the runtime computes them.

    Args:
        expected: multiplications of the Program whose operands both have integer codes of 8 bits at most, with scales
            that factor out of the sum, and those by output heads whose float activations the export splits into digits.
        found: integer kernels in the runtime's optimized graph.
        integer: those by operator.
        floating: multiplications in float, by operator; Attention counts as one.
        expected_low_bit: multiplications of the Program with float activations and stored codes of at most 8 bits, for
            which the runtime has a MatMulNBits at the export's accuracy level.
        low_bit_weights: MatMulNBits by bits and accuracy level.
        float_reasons: why multiplications of the Program are no integer ones, with how many of them are concerned.
        fell_back: where fewer kernels than expected were found: multiplications that the runtime computes in float
            though their operands have codes, by its names, each with what reads the result.
    """

    expected: int
    found: int
    expected_low_bit: int
    integer: Mapping[str, int]
    floating: Mapping[str, int]
    low_bit_weights: Mapping[str, int]
    float_reasons: Mapping[str, int]
    fell_back: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "fell_back": list(self.fell_back)}

    def headline(self) -> dict[str, Any]:
        """Products in integers, and those that read packed weights: ``[found, expected]`` where any is expected.

        With them, where there are any, the products of quantized operands that no integer kernel computes.
        """
        packed = sum(self.low_bit_weights.values())
        pairs = {"integer_products": (self.found, self.expected), "packed_products": (packed, self.expected_low_bit)}
        figures: dict[str, Any] = {name: list(pair) for name, pair in pairs.items() if pair[1]}
        if self.dequantized:
            figures["dequantized_products"] = sum(self.dequantized.values())
        return figures

    @property
    def dequantized(self) -> dict[str, int]:
        """Why products of quantized operands are computed in float, with how many of them are."""
        return {reason: count for reason, count in self.float_reasons.items() if reason not in FLOAT_OPERANDS}

    def notes(self) -> tuple[str, ...]:
        """What a user should know of them, a line each."""
        return tuple(
            f"products of quantized operands that run in float: {count}, since {reason}"
            + ("; the pass `legalize` makes integer products of them" if _GROUPED in reason else "")
            for reason, count in self.dequantized.items()
        )

    @property
    def rounds_activations(self) -> bool:
        """Whether a MatMulNBits quantizes its float activations to 8 bits."""
        return any(key.endswith(f"={ROUNDS_ACTIVATIONS}") for key in self.low_bit_weights)


def joined(reports: Sequence[KernelReport]) -> KernelReport:
    """The report of several models that run one after the other."""
    first, *others = reports
    if not others:
        return first
    counts = {
        name: dict(sorted(sum((Counter(getattr(report, name)) for report in reports), Counter[str]()).items()))
        for name in ("integer", "floating", "low_bit_weights", "float_reasons")
    }
    return KernelReport(
        expected=sum(report.expected for report in reports),
        found=sum(report.found for report in reports),
        expected_low_bit=sum(report.expected_low_bit for report in reports),
        fell_back=tuple(name for report in reports for name in report.fell_back),
        **counts,
    )


def inspect_kernels(
    program: Program,
    path: Path,
    graph: ir.Graph,
    *,
    session_config: Mapping[str, str] | None = None,
    accuracy_level: int = FLOAT_ACTIVATIONS,
    split: Collection[str] = (),
) -> KernelReport:
    """Count the kernels that the runtime runs.

    Args:
        program: what was exported.
        path: the model.
        graph: what onnxruntime makes of it.
        session_config: session configuration entries.
        accuracy_level: of MatMulNBits that the export was asked for.
        split: the names of codes that the export multiplies with float activations as integers of several digits.

    Raises:
        CheckError: the runtime computes with 8-bit activations what the program (and the model in the file) computes
            with float ones.
    """
    expected, reasons = expected_kernels(program, split)
    config = session_config or {}
    low_bit = sum(expected_low_bit(program, accuracy_level, split))
    report = count_kernels(graph, expected=expected, expected_low_bit=low_bit, reasons=reasons)
    if config.get(LEVEL_ENTRY) == str(ROUNDS_ACTIVATIONS):
        return report
    rounding = [node for node in graph if node.op_type == NBITS and _level(node) == ROUNDS_ACTIVATIONS]
    written = {node.name for node in read_model(path).graph if node.op_type == NBITS} if rounding else set()
    for node in rounding:
        if node.name not in written:
            raise CheckError(
                f"onnxruntime turns {node.name} into a {NBITS} that rounds its float activations to 8 bits",
                hint=f"set the session entry {LEVEL_ENTRY} to 0, or write the weight without DequantizeLinear",
            )
    return report


def _level(node: ir.Node) -> int:
    return node.attributes.get_int("accuracy_level", 0)


class Optimized(NamedTuple):
    """What onnxruntime makes of a model: the session that users will have, and its graph as a file."""

    session: Session
    path: Path


@contextlib.contextmanager
def optimized_model(path: Path, session_config: Mapping[str, str]) -> Iterator[Optimized]:
    """``path`` as users will load it; the file of the optimized graph is there as long as it is needed.

    Raises:
        CheckError: the model does not load.
        BitlowerError: the temporary folder is full.
    """
    with scratch_folder() as folder:
        optimized = folder / "optimized.onnx"
        yield Optimized(Session(path, config=session_config, optimized=optimized), optimized)


def count_kernels(
    *graphs: ir.Graph, expected: int = 0, expected_low_bit: int = 0, reasons: Mapping[str, int] | None = None
) -> KernelReport:
    """Count the multiplications of an optimized graph, or of several that run one after the other."""
    nodes = [node for graph in graphs for node in graph]
    kernels = FUSED | integer_operators()
    integer = Counter(node.op_type for node in nodes if node.op_type in kernels)
    floating = Counter(node.op_type for node in nodes if node.op_type in FLOAT)
    low_bit = Counter(
        f"bits={node.attributes.get_int('bits', 4)} accuracy_level={node.attributes.get_int('accuracy_level', 0)}"
        for node in nodes
        if node.op_type == NBITS
    )
    missing = integer.total() < expected or low_bit.total() < expected_low_bit
    return KernelReport(
        expected=expected,
        found=integer.total(),
        expected_low_bit=expected_low_bit,
        integer=dict(sorted(integer.items())),
        floating=dict(sorted(floating.items())),
        low_bit_weights=dict(sorted(low_bit.items())),
        float_reasons=dict(sorted((reasons or {}).items())),
        fell_back=tuple(_fallbacks(nodes)) if missing else (),
    )


def _fallbacks(nodes: Sequence[ir.Node]) -> Iterator[str]:
    """The float products of codes, or all float products where codes are not to be seen, and what reads each."""
    products = [node for node in nodes if node.op_type in FLOAT - ATTENTIONS]
    coded = [node for node in products if all(_is_decoded(value) for value in node.inputs[:2])]
    for node in coded or products:
        readers = sorted({user.op_type for user, _ in node.outputs[0].uses()}) or ["an output"]
        yield f"{node.name} is computed in float, read by {' and '.join(readers)}"


def _is_decoded(value: ir.Value | None) -> bool:
    """Whether a value is what codes stand for, moved or not."""
    producer = value.producer() if value is not None else None
    while producer is not None and is_view(producer):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def expected_kernels(program: Program, split: Collection[str] = ()) -> tuple[int, Counter[str]]:
    """How many multiplications of the Program have integer operands, or get them by ``split``; why others have not."""
    reasons = Counter(
        "" if _codes_of(right) in split else float_reason(left, right) for left, right in multiplications(program.graph)
    )
    reasons.update(conv_reason(node) for node in program.graph.nodes if node.target in CONVOLUTION)
    return reasons.pop("", 0), reasons


def expected_low_bit(program: Program, accuracy_level: int, split: Collection[str] = ()) -> Iterator[bool]:
    """For each multiplication with a stored quantized weight that is not ``split``, whether MatMulNBits can do it."""
    for left, right in multiplications(program.graph):
        weight, activation = unviewed(right), unviewed(left)
        stored = weight.target is ops.dequantize and all(part.op == "get_attr" for part in weight.all_input_nodes)
        if not stored or activation.target is ops.dequantize or _codes_of(right) in split:
            continue
        codes, scale = (get_tensor(program.module, str(part.target)) for part in weight.all_input_nodes[:2])
        quantizer: Quantizer = weight.meta["quantizer"]
        yield isinstance(container(quantizer.spec, codes.shape, scale.shape, accuracy_level), Container)


def multiplications(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of each linear and matmul."""
    for node in graph.nodes:
        if node.target in LINEAR:
            yield LinearNode(node).x, LinearNode(node).weight
        elif node.target in MATMUL:
            yield BinaryNode(node).left, BinaryNode(node).right


def _codes_of(weight: fx.Node) -> str:
    """The name of the stored codes that ``weight`` is computed from; empty if it is not."""
    node = unviewed(weight)
    codes = QuantizerNode(node).value if node.target is ops.dequantize else None
    return str(codes.target) if isinstance(codes, fx.Node) and codes.op == "get_attr" else ""
