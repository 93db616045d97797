"""Bias correction (Nagel et al. 2019, §4.2): take the mean error that quantization makes off each linear's bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import fx
from torch.nn import functional

from bitlower.ir import BitlowerError, Level, Program, TensorType, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import linears
from bitlower.ir.folding import without_quantizers
from bitlower.ir.lockstep import Read, steps
from bitlower.ir.operators import LinearNode
from bitlower.ir.quantizer_node import require_calibrated
from bitlower.ir.token_weights import WEIGHTINGS
from bitlower.ir.tokens import token_rows
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.report import Record, counted, few

aten = torch.ops.aten


@dataclass(frozen=True)
class BiasRow:
    """One linear.

    Args:
        layer: its path in the model.
        tokens: how many calibration tokens the means are over.
        error: the mean error of its outputs before, tokens weighted, root mean square over the outputs.
        skipped: why its bias stays as it is; empty if it was corrected.
    """

    layer: str
    tokens: int
    error: float
    skipped: str


@dataclass(frozen=True)
class BiasReport(Record):
    """Every linear whose weight or input is quantized, in execution order."""

    rows: tuple[BiasRow, ...]

    def summary(self) -> str:
        """How many biases were corrected."""
        corrected = sum(not row.skipped for row in self.rows)
        return f"the biases of {corrected:,} of {counted(len(self.rows), 'linear')} corrected"

    def details(self) -> Iterable[str]:
        """Which stay as they are, and why."""
        return few(f"{row.layer}: {row.skipped}" for row in self.rows if row.skipped)


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Subtract ``E[Ŵ x̂] − E[W x]`` from the bias of each linear whose weight or input is quantized (empirical form).

    Layer by layer: the quantized inputs are those behind layers that are corrected already, the float ones those of the
    program without its quantizers. Weights that an earlier pass rewrote to their grids (`gptq`, `adaround`) are their
    own float weights: for those it takes off what the inputs' quantization does, not what theirs did.
    """

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    keeps_sizes: ClassVar[bool] = True
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts in the mean, by the norm of its float output. ``none`` is the published mean: a few
    tokens of huge norm may own it, and the bias that fixes their error is added to all others."""
    add: bool = False
    """Give a bias to linears that have none."""
    memory: Annotated[int, Ge(0)] = 2 << 30
    """Bytes of activations that are held in memory; more go to disk."""

    def data_runs(self, program: Program) -> int:
        """The float and the quantized program."""
        return 2

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Correct the biases and leave a :class:`BiasReport`.

        Raises:
            BitlowerError: a quantizer without a range, no calibration batches, or a layer that no token reaches or
                whose inputs are not finite; it is named.
        """
        require_calibrated(program)
        layers = quantized_linears(program.graph)
        if layers and not context.calibration:
            raise BitlowerError("correct-bias needs calibration data", hint="give calibration batches")
        if self.add:
            for linear in layers:
                _add_bias(program, linear)
        reference, references = without_quantizers(program)
        rows = []
        pairs = zip(
            steps(program, layers, context.calibration, budget=self.memory // 2, folder=context.work),
            steps(
                reference,
                [references[n] for n in layers],
                context.calibration,
                budget=self.memory // 2,
                folder=context.work,
            ),
            strict=True,
        )
        with torch.no_grad():
            for (linear, read), (float_linear, read_float) in context.track(pairs, "bias correction"):
                mean_error = _mean_error(program, (linear, float_linear), (read, read_float), self.weighting)
                rows.append(_correct(program, linear, mean_error))
        context.put(BiasReport(tuple(rows)))
        return any(not row.skipped for row in rows)


def quantized_linears(graph: fx.Graph) -> list[fx.Node]:
    """The linears whose weight or input comes straight from a quantizer."""
    return [
        node
        for node in linears(graph)
        if node.target is aten.linear.default
        and ops.fake_quantize in (LinearNode(node).weight.target, LinearNode(node).x.target)
    ]


@dataclass(frozen=True)
class _Error:
    """The mean error of a linear's outputs, ``[out]`` float64, over so many tokens."""

    mean: torch.Tensor
    tokens: int


def _mean_error(program: Program, pair: tuple[fx.Node, fx.Node], reads: tuple[Read, Read], weighting: str) -> _Error:
    """The weighted mean of what quantization adds to the outputs of a linear: ``Ŵ E[x̂] − W E[x]``."""
    sources = [LinearNode(linear).x for linear in pair]
    shape, bias = sources[0].meta["type"].shape, _stored_bias(program, pair[0])
    exact_weight = next(reads[1](LinearNode(pair[1]).weight))[0]
    sums, total, tokens = torch.zeros(2, int(shape[-1]), dtype=torch.float64), 0.0, 0
    for (quantized, batch), (exact, _) in zip(reads[0](sources[0]), reads[1](sources[1]), strict=True):
        rows = [token_rows(value, shape, batch) for value in (quantized, exact)]
        norms = functional.linear(rows[1], exact_weight, bias).square().sum(1)
        weights = _weights(norms, weighting)
        sums += torch.stack([weights @ part.double() for part in rows])
        total, tokens = total + float(weights.sum()), tokens + len(weights)
    if not total:
        raise BitlowerError(
            f"{_path(pair[0])} was never reached by calibration data",
            hint="calibrate on texts that reach it, or exclude the layer",
        )
    if not bool(torch.isfinite(sums).all()):
        raise BitlowerError(
            f"{_path(pair[0])}: its calibration inputs hold NaN or Inf",
            hint="run the float model on the calibration data by itself",
        )
    rounded_weight = next(reads[0](LinearNode(pair[0]).weight))[0]
    means = sums / total
    return _Error(rounded_weight.double() @ means[0] - exact_weight.double() @ means[1], tokens)


def _weights(norms: torch.Tensor, weighting: str) -> torch.Tensor:
    """How much each token counts, ``[tokens]`` float64; those whose output is zero count as little as any."""
    floor = torch.finfo(torch.float32).tiny
    return WEIGHTINGS[weighting](norms.double().clamp(min=floor)) if len(norms) else norms.double()


def _stored_bias(program: Program, linear: fx.Node) -> torch.Tensor | None:
    name = LinearNode(linear).stored_bias
    return get_tensor(program.module, name).detach() if name else None


def _correct(program: Program, linear: fx.Node, mean_error: _Error) -> BiasRow:
    """Write the corrected bias of one linear."""
    error = mean_error.mean
    bias = LinearNode(linear).bias
    skipped = ""
    if bias is None:
        skipped = "it has no bias"
    elif bias.op == "get_attr" and set(bias.users) == {linear}:
        name = str(bias.target)
        old = get_tensor(program.module, name)
        set_tensor(program.module, name, torch.nn.Parameter((old.detach() - error).to(old.dtype), old.requires_grad))
    else:
        skipped = "its bias is computed, or another layer's too"
    return BiasRow(_path(linear), mean_error.tokens, float(error.square().mean().sqrt()), skipped)


def _add_bias(program: Program, linear: fx.Node) -> None:
    """Give ``linear`` a bias of zeros if it has none."""
    if LinearNode(linear).bias is not None:
        return
    target = f"bias_correction.{linear.name}"
    bias = torch.zeros(int(linear.meta["type"].shape[-1]))
    set_tensor(program.module, target, torch.nn.Parameter(bias))
    with linear.graph.inserting_before(linear):
        node = linear.graph.get_attr(target)
    node.meta = {"type": TensorType(torch.float32, tuple(bias.shape))}
    LinearNode(linear).set("bias", node)


def _path(linear: fx.Node) -> str:
    return str(linear.meta.get("path") or LinearNode(linear).weight.name)
