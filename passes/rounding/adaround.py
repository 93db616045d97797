"""AdaRound (Nagel et al. 2020): learn for each weight whether it is rounded up or down, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Interval
from torch import fx
from torch.nn import functional

from bitlower.ir import BitlowerError, Level, Program, get_tensor, set_tensor
from bitlower.ir.charts import BarChart, Chart, Topic
from bitlower.ir.dataflow import ACTIVATION, linears
from bitlower.ir.folding import without_quantizers
from bitlower.ir.lockstep import Read, steps
from bitlower.ir.operators import LinearNode, further_arguments
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.ir.storage import like
from bitlower.ir.token_weights import token_weights
from bitlower.ir.tokens import token_rows
from bitlower.ir.weight_ranges import WeightRanges, calibrate_weights, uncalibrated_weights
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.checkpoints import Stored, load_checkpoint, save_checkpoint
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes._machinery.workload import Workload
from bitlower.passes.rounding._adaround_solver import AdaroundLayer, AdaroundOptions, Function, Rounded, solve

LAYER_COPIES = 14
"""What the optimizer of a layer holds, in copies of its weight: measured on encoders of 6 and 12 layers."""
STEP_WORK = 1600.0
"""What a step does weight by weight, in the time of so many operations of a matrix product: measured on the same."""


@dataclass(frozen=True)
class AdaroundRow:
    """What became of one weight.

    Args:
        weight: the parameter's name.
        spec: its grid and granularity.
        tokens: how many tokens its rounding was learned on.
        loss: squared error of the layer's output, summed over outputs, mean over tokens as they are weighted.
        nearest_loss: the same for round-to-nearest on the same grid.
        flipped: the share of the codes that are not the nearest.
        kept_rows: outputs whose weights all stayed nearest.
        notes: what was unusual.
    """

    weight: str
    spec: str
    tokens: int
    loss: float
    nearest_loss: float
    flipped: float
    kept_rows: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AdaroundReport(Record):
    """Every weight that was rewritten, in execution order."""

    rows: tuple[AdaroundRow, ...]

    def summary(self) -> str:
        """How the errors compare with those of round-to-nearest."""
        shares = [row.loss / row.nearest_loss for row in self.rows if row.nearest_loss]
        text = f"{counted(len(self.rows), 'weight')} rewritten"
        if not shares:
            return text
        flipped = fmean(row.flipped for row in self.rows)
        text += f"; error of outputs: {median(shares):.3g} of round-to-nearest's (median)"
        return f"{text}; {flipped:.1%} of codes flipped"

    def details(self) -> Iterable[str]:
        """What was unusual."""
        return few(note for row in self.rows for note in row.notes)

    def charts(self) -> Iterable[Chart]:
        """The errors beside those of round-to-nearest, weight by weight."""
        names = tuple(row.weight for row in self.rows)
        if names:
            learned, nearest = (tuple(getattr(row, key) for row in self.rows) for key in ("loss", "nearest_loss"))
            bars = {"AdaRound": learned, "round to nearest": nearest}
            yield BarChart("Error of layers' outputs", "squared error a token", names, bars, "training", True)


@dataclass(frozen=True)
class Adaround(Pass):
    """Rewrite the weights of linears with an uncalibrated quantizer to values on its grid, and set its range.

    Two walks side by side, on all calibration batches: each layer's inputs come from predecessors that are rewritten
    already, its targets from the float model (asymmetric reconstruction). Scales of any granularity are laid over the
    weights first and stay. Tables and norm weights with uncalibrated quantizers are rounded to nearest. Activation
    quantizers stay as they are, calibrated or not: `calibrate` is for those that are not, before or after this pass.
    """

    name: ClassVar[str] = "adaround"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    draws: ClassVar[frozenset[Topic]] = frozenset({"training"})
    contract: ClassVar[Contract] = Contract.LOSSY
    rewrites_weights: ClassVar[bool] = True
    keeps_sizes: ClassVar[bool] = True
    iterations: Annotated[int, Ge(1)] = 1000
    """Steps of Adam a layer."""
    learning_rate: Annotated[float, Gt(0)] = 0.01
    """Of α. The original uses 0.01 and ten thousand steps; Bondarenko et al. 0.001, with which a thousand do little."""
    batch: Annotated[int, Ge(1)] = 256
    """Tokens a step, drawn at random."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm"] = "unit-norm"
    """How much a token counts, by the norm of its target. ``unit-norm`` takes its error relative to its own energy;
    ``none`` is the published mean, which a few tokens of huge norm may own: the layer then serves them alone, and a
    normalization after it makes the error of all others large."""
    regularization: Annotated[float, Ge(0)] = 3.0
    """λ: the weight of the term that drives every rounding to up or down, a weight of the layer, against an error in
    units of what rounding it to nearest costs on average; so it means the same in every layer."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    """The share of the steps, at the beginning, that has no such term."""
    ranges: WeightRanges = "mse-golden"
    """How grids are laid over the weights."""
    activation: bool = True
    """Compare outputs behind the activation function where the layer feeds one and nothing else."""
    tokens: Annotated[int, Ge(1)] = 8192
    """So many calibration tokens a layer at most, drawn at random."""
    memory: Annotated[int, Ge(0)] = 2 << 30
    """Bytes of activations that are held in memory; more go to disk."""

    def data_runs(self, program: Program) -> int:
        """The float and the quantized program."""
        return 2

    def solver_bytes(self, workload: Workload) -> int:
        """The activations of two walks, at most ``memory``, the float weights, and a layer with its tokens."""
        if not workload.widths:
            return 0
        between = 2 * workload.tokens * (max(workload.widths) + 2 * min(workload.widths)) * 4
        tokens = min(self.tokens, workload.tokens)
        layer = max(LAYER_COPIES * rows * columns + 3 * tokens * (rows + columns) for rows, columns in workload.shapes)
        weights = sum(rows * columns for rows, columns in workload.shapes)
        return int(min(self.memory, between) + 4 * (weights + layer))

    def solver_operations(self, workload: Workload) -> float:
        """For each step and weight 4 operations a token, forwards and backwards, and ``STEP_WORK``."""
        steps = self.iterations * (4.0 * self.batch + STEP_WORK)
        return steps * sum(rows * columns for rows, columns in workload.shapes)

    def rehearsed(self) -> Self:
        """Two iterations a layer."""
        return replace(self, iterations=min(self.iterations, 2))

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite all uncalibrated weights and leave an :class:`AdaroundReport`.

        Raises:
            BitlowerError: no calibration batches, a layer that no token reaches, or values
                that are not finite; the layer is named.
        """
        layers = uncalibrated_linears(program)
        nearest = [node for node in uncalibrated_weights(program.module) if node not in layers.values()]
        if layers and not context.calibration:
            raise BitlowerError("adaround needs calibration data", hint="give calibration batches, or use `rtn`")
        reference, references = without_quantizers(program)
        calibrate_weights(program.module, nearest, self.ranges)
        options: dict[str, Any] = {"budget": self.memory // 2, "folder": context.work}
        stops = [references[linear] for linear in layers]
        rows: list[AdaroundRow] = []
        with torch.no_grad():
            pairs = zip(
                steps(program, list(layers), context.calibration, **options),
                steps(reference, stops, context.calibration, **options),
                strict=True,
            )
            for (linear, read), (float_linear, read_float) in context.track(pairs, "adaround"):
                calibrate_weights(program.module, [layers[linear]], self.ranges)
                pair = _Pair(program.module, linear, layers[linear], float_linear, read, read_float)
                rows.append(_rewrite(pair, self, context))
        context.put(AdaroundReport(tuple(rows)))
        return bool(layers or nearest)


def uncalibrated_linears(program: Program) -> dict[fx.Node, fx.Node]:
    """The linears whose weights have an uncalibrated quantizer, with it; of several with one weight the first."""
    layers: dict[fx.Node, fx.Node] = {}
    for linear in linears(program.graph):
        quantizer = LinearNode(linear).weight
        if quantizer in layers.values() or not is_uncalibrated(quantizer):
            continue
        if quantizer.meta["quantizer"].role == "linear-weight":
            layers[linear] = quantizer
    return layers


@dataclass(frozen=True)
class _Pair:
    """A linear, the quantizer of its weight, its node in the float model, and what both read."""

    module: fx.GraphModule
    linear: fx.Node
    quantizer: fx.Node
    reference: fx.Node
    read: Read
    read_float: Read

    @property
    def name(self) -> str:
        """The weight's."""
        return QuantizerNode(self.quantizer).parameter

    @property
    def weight(self) -> torch.Tensor:
        """The weight."""
        return QuantizerNode(self.quantizer).weight(self.module)

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point."""
        return QuantizerNode(self.quantizer).range(self.module)

    def bias(self) -> torch.Tensor | None:
        """The linear's; None if it has none, or one that is computed."""
        name = LinearNode(self.linear).stored_bias
        return get_tensor(self.module, name).detach() if name else None

    def tokens(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The inputs of each batch, quantized and float, ``[tokens, in]`` each; padding left out."""
        source = LinearNode(self.linear).x
        pairs = zip(self.read(source), self.read_float(LinearNode(self.reference).x), strict=True)
        for (quantized, batch), (float_, _) in pairs:
            shape = source.meta["type"].shape
            yield token_rows(quantized, shape, batch), token_rows(float_, shape, batch)


def _rewrite(pair: _Pair, options: Adaround, context: Context) -> AdaroundRow:
    """Learn the rounding of one layer, or read it from a checkpoint, and write it into the program."""
    stored = load_checkpoint(context.work, pair.name)
    if stored is None:
        stored = _learn(pair, options, context)
        save_checkpoint(context.work, pair.name, stored)
    old = get_tensor(pair.module, pair.name)
    weight = like(numerics.values(stored.tensors["codes"], *pair.range), old)
    set_tensor(pair.module, pair.name, torch.nn.Parameter(weight, requires_grad=old.requires_grad))
    [row] = stored.rows
    return AdaroundRow(**row | {"notes": tuple(row["notes"])})


def _learn(pair: _Pair, options: Adaround, context: Context) -> Stored:
    generator = context.generator(f"adaround/{pair.name}")
    spec = pair.quantizer.meta["quantizer"].spec
    weight = pair.weight.float()
    activation = following_activation(pair.linear) if options.activation else _identity
    inputs, floats = _sample(pair, max(1, options.tokens // len(context.calibration)), generator)
    parts = [activation(functional.linear(part, weight, pair.bias())) for part in torch.split(floats, options.batch)]
    targets = torch.cat(parts)
    layer = AdaroundLayer(
        weight, pair.bias(), activation, *pair.range, (spec.grid.quant_min, spec.grid.quant_max),
        inputs, targets, token_weights(targets.square().sum(1), options.weighting),
    )  # fmt: skip
    settings = AdaroundOptions(
        options.iterations, options.learning_rate, options.batch, options.regularization, options.warmup
    )
    rounded = solve(layer, settings, generator)
    return Stored({"codes": rounded.codes.to(spec.grid.dtype)}, [_row(pair.name, str(spec), rounded, inputs)])


def _sample(pair: _Pair, share: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``share`` tokens of each batch: quantized inputs and float ones."""
    parts = []
    for rows in pair.tokens():
        chosen = torch.randperm(len(rows[0]), generator=generator)[:share].sort().values
        parts.append([part[chosen].float() for part in rows])
    inputs, floats = (torch.cat(side) for side in zip(*parts, strict=True))
    if not len(inputs):
        raise BitlowerError(
            f"{pair.name} was never reached by calibration data",
            hint="calibrate on texts that reach it, or exclude the layer",
        )
    if not bool(torch.isfinite(inputs).all() & torch.isfinite(floats).all()):
        raise BitlowerError(
            f"{pair.name}: its calibration inputs hold NaN or Inf",
            hint="run the float model on the calibration data by itself",
        )
    return inputs, floats


def following_activation(linear: fx.Node) -> Function:
    """The activation function that alone reads ``linear``; the identity if there is none."""
    users = list(linear.users)
    if len(users) != 1 or users[0].target not in ACTIVATION:
        return _identity
    [user] = users
    function: Any = user.target
    return lambda x: function(x, *further_arguments(user), **user.kwargs)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _row(name: str, spec: str, rounded: Rounded, inputs: torch.Tensor) -> dict[str, Any]:
    tokens, columns = inputs.shape
    short = [f"{name}: {tokens} calibration tokens are few for {columns} columns"] if tokens < columns else []
    return {
        "weight": name,
        "spec": spec,
        "tokens": tokens,
        "loss": float(rounded.loss.sum()),
        "nearest_loss": float(rounded.nearest_loss.sum()),
        "flipped": rounded.flipped / rounded.codes.numel(),
        "kept_rows": rounded.nearest_rows,
        "notes": short,
    }
