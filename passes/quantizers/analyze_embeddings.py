"""Measure whether rounded token embeddings grow alike, and how differently the weights of modules are clipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import fx
from torch.nn import functional

from bitlower.ir import BitlowerError, Level, Program, Quantizer, get_tensor
from bitlower.ir.dataflow import vocabularies
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode, require_calibrated
from bitlower.ir.storage import release
from bitlower.ir.tokens import ENCODER_SEQUENCE, SEQUENCE, TARGET, token_ids, token_mask
from bitlower.ir.weight_ranges import weight_range
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.quantizers._embedding_report import BINS, EmbeddingReport, ModuleRange, Similarity

__all__ = ["AnalyzeEmbeddings", "EmbeddingReport", "analyze"]


@dataclass(frozen=True)
class AnalyzeEmbeddings(Pass):
    """Leave an :class:`EmbeddingReport` on a calibrated program: the two claims of QuantGPT (Tao et al. 2022, §3.1).

    Few bits make token embeddings alike: the cosine between any two of the most frequent tokens, in float and rounded.
    Weights of modules differ in distribution: the share of its largest weight at which each is clipped. Float is the
    model before it got quantizers, where the pipeline still has it, else the program's own weights.
    """

    name: ClassVar[str] = "analyze-embeddings"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.ANALYSIS
    tokens: Annotated[int, Interval(ge=2, le=10_000)] = 500
    """How many tokens are compared, those most frequent in the calibration data."""

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Analyze and leave the report.

        Raises:
            BitlowerError: there is no calibration data, a quantizer has no range, or token ids index no table.
        """
        context.put(analyze(program, self.tokens, context))
        return False


def analyze(program: Program, tokens: int, context: Context) -> EmbeddingReport:
    """Return the report on ``program``.

    Raises:
        BitlowerError: there is no calibration data, a quantizer has no range, or token ids index no table.
    """
    require_calibrated(program)
    table = next((node for node, _ in vocabularies(program.graph) if node.op == "get_attr"), None)
    if table is None:
        raise BitlowerError("no stored table is indexed by token ids", hint="leave out `analyze-embeddings`")
    name = str(table.target)
    ids = frequent_tokens(context, tokens)
    own = get_tensor(program.module, name).detach()
    reference = _in_reference(context, name, own)
    quantizer = next((user for user in table.users if "quantizer" in user.meta), None)
    rounded = _rounded(program, quantizer, ids) if quantizer else None
    report = EmbeddingReport(
        name,
        len(ids),
        similarity(reference[ids]),
        similarity(rounded) if rounded is not None else None,
        tuple(_modules(program)),
    )
    release(own)
    release(reference)
    return report


def frequent_tokens(context: Context, count: int) -> torch.Tensor:
    """The ids of the most frequent tokens that are no padding, the most frequent first, of equals the lower id.

    Raises:
        BitlowerError: the calibration data have fewer than two different tokens.
    """
    seen: list[torch.Tensor] = []
    for batch in context.calibration:
        for dim in (SEQUENCE, ENCODER_SEQUENCE) if TARGET in batch else (SEQUENCE,):
            ids, mask = token_ids(batch, dim), token_mask(batch, dim)
            if ids is not None:
                seen.append(ids[mask] if mask is not None else ids.flatten())
    counts = torch.bincount(torch.cat(seen).long()) if seen else torch.zeros(0, dtype=torch.int64)
    if int((counts > 0).sum()) < 2:
        raise BitlowerError("embeddings are compared for tokens of calibration data", hint="give calibration batches")
    order = counts.argsort(descending=True, stable=True)
    return order[: min(count, int((counts > 0).sum()))]


def similarity(rows: torch.Tensor) -> Similarity:
    """The cosines between all pairs of ``rows``, ``[tokens, channels]``; rows of zeros are left out."""
    rows = rows.float()
    rows = functional.normalize(rows[rows.any(-1)], dim=-1)
    if len(rows) < 2:
        return Similarity(float("nan"), (0.0,) * BINS)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    cosines = (rows @ rows.T)[first, second].clamp(-1, 1)
    shares = torch.histc(cosines, BINS, -1, 1) / len(cosines)
    return Similarity(float(cosines.mean(dtype=torch.float64)), tuple(shares.tolist()))


def _in_reference(context: Context, name: str, own: torch.Tensor) -> torch.Tensor:
    """The table of the float model; ``own`` where that is not at hand or has another one."""
    if context.reference is not None:
        nodes = context.reference.graph.find_nodes(op="get_attr", target=name)
        if any(node.meta["type"].shape == tuple(own.shape) for node in nodes):
            return get_tensor(context.reference.module, name).detach()
    return own


def _rounded(program: Program, quantizer: fx.Node, ids: torch.Tensor) -> torch.Tensor:
    view = QuantizerNode(quantizer)
    grid = view.spec.grid
    weight, (scale, zero_point) = view.weight(program.module), view.range(program.module)
    return numerics.fake(weight, scale, zero_point, grid.quant_min, grid.quant_max)[ids]


def _modules(program: Program) -> Iterator[ModuleRange]:
    """How each quantized weight is clipped, in graph order."""
    for node, quantizer in program.quantizers():
        if QuantizerNode(node).rounds_parameter:
            weight = QuantizerNode(node).weight(program.module)
            yield _module(program, node, quantizer, weight)
            release(weight)


def _module(program: Program, node: fx.Node, quantizer: Quantizer, weight: torch.Tensor) -> ModuleRange:
    grid, scale = quantizer.spec.grid, QuantizerNode(node).range(program.module)[0]
    low, high = weight_range(program.module, node, "minmax")
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        reach, needed = scale * grid.quant_max, torch.maximum(-low, high)
    else:
        reach, needed = scale * (grid.quant_max - grid.quant_min), high - low
    there = needed > 0
    covered = (reach[there] / needed[there]).double()
    mean = float(covered.mean()) if covered.numel() else float("nan")
    centered = weight.double() - weight.double().mean()
    variance = centered.square().mean()
    kurtosis = float(centered.pow(4).mean() / variance.square()) if float(variance) > 0 else float("nan")
    return ModuleRange(quantizer.tensor, quantizer.role, grid.bits, scale.numel(), mean, kurtosis)
