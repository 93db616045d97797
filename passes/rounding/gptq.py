"""GPTQ (Frantar et al. 2022): rewrite weights to their grids so that a layer's output on real inputs changes least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import fx
from torch.nn import functional

from bitlower.ir import BitlowerError, Granularity, Level, Program, QuantSpec, get_tensor, set_tensor
from bitlower.ir.charts import BarChart, Chart, Topic
from bitlower.ir.dataflow import linears
from bitlower.ir.folding import without_quantizers
from bitlower.ir.lockstep import Read, walk
from bitlower.ir.operators import LinearNode
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.ir.storage import like, release, trim
from bitlower.ir.tokens import token_dim, token_mask
from bitlower.ir.weight_ranges import calibrate_weights, uncalibrated_weights
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.checkpoints import Stored, load_checkpoint, save_checkpoint
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes._machinery.workload import Workload
from bitlower.passes.rounding._gptq_factor import Factor, factorize
from bitlower.passes.rounding._gptq_solver import GptqOptions, GptqSolution, solve
from bitlower.passes.rounding._hessian import Hessian
from bitlower.passes.rounding._token_gradients import token_gradients

PARTS = ("codes", "scale", "zero_point")
"""What makes a weight on its grid."""
_UNIT_OUTPUT = "unit-output"
_TOKENS = 2048
"""So many tokens at least enter a Hessian at once."""
_ELEMENTS = 1 << 22
"""So many weights at most are solved at once; rows do not depend on one another."""


@dataclass(frozen=True)
class GptqRow:
    """What became of one weight.

    Args:
        weight: the parameter's name.
        spec: its grid and granularity.
        tokens: how many tokens its Hessian has seen.
        loss: ``E H Eᵀ`` summed over rows, E being the change of the weight and H the Hessian that was used.
        rtn_loss: the same for round-to-nearest on grids from end to end; None without guard.
        kept_rows: rows that the guard rounded to nearest.
        damping: the share of the mean diagonal that was added to the Hessian.
        notes: what was unusual.
    """

    weight: str
    spec: str
    tokens: int
    loss: float
    rtn_loss: float | None
    kept_rows: int
    damping: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GptqReport(Record):
    """Every weight that was rewritten, in execution order."""

    rows: tuple[GptqRow, ...]

    def summary(self) -> str:
        """How the errors compare with those of round-to-nearest."""
        shares = [row.loss / row.rtn_loss for row in self.rows if row.rtn_loss]
        nearest_rows = sum(row.kept_rows for row in self.rows)
        text = f"{counted(len(self.rows), 'weight')} rewritten"
        if shares:
            text += f"; error under the Hessian: {median(shares):.3g} of round-to-nearest's (median)"
        return f"{text}; {counted(nearest_rows, 'row')} rounded to nearest" if nearest_rows else text

    def details(self) -> Iterable[str]:
        """What was unusual."""
        return few(note for row in self.rows for note in row.notes)

    def charts(self) -> Iterable[Chart]:
        """The errors beside those of round-to-nearest, weight by weight."""
        names = tuple(row.weight for row in self.rows)
        if names:
            bars: dict[str, tuple[float | None, ...]] = {"GPTQ": tuple(row.loss for row in self.rows)}
            if any(row.rtn_loss is not None for row in self.rows):
                bars["round to nearest"] = tuple(row.rtn_loss for row in self.rows)
            yield BarChart("Error of weights under the Hessian", "E H Eᵀ", names, bars, "training", logarithmic=True)


@dataclass(frozen=True)
class Gptq(Pass):
    """Rewrite the weights of linears with an uncalibrated quantizer to values on its grid, and set its range.

    One walk through the model on all calibration batches at once: each layer's inputs come from predecessors that are
    rewritten already (the paper's true-sequential order) or from the float model, and layers that read the same
    activation share one Hessian.
    Embedding tables and norm weights with uncalibrated quantizers are rounded to nearest. Activation quantizers stay as
    they are: run `calibrate` after this pass for those.
    """

    name: ClassVar[str] = "gptq"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    draws: ClassVar[frozenset[Topic]] = frozenset({"training"})
    rewrites_weights: ClassVar[bool] = True
    keeps_sizes: ClassVar[bool] = True
    damping: Annotated[float, Interval(ge=0, le=1)] = 0.01
    """Share of the mean diagonal that is added to the Hessian; raised where it stays singular."""
    weighting: Literal["none", "unit-norm", "root-norm", "clipped-norm", "unit-output"] = "unit-norm"
    """How much a token counts in the Hessian. ``none`` is the published sum: a few tokens of huge norm (attention
    sinks) then own it. ``unit-norm`` counts every token the same, as the normalization after the residual sum does.
    ``root-norm`` lies half way; ``clipped-norm`` scales down only tokens far above the median; ``unit-output`` makes
    the outputs of the layers that share the Hessian, and not their input, count the same."""
    inputs: Literal["quantized", "float"] = "quantized"
    """Where a layer's inputs come from: layers that are rewritten already, or the float model."""
    gradient: Annotated[float, Ge(0)] = 0.0
    """For causal language models: a token's weight is multiplied by this power of the squared norm of the loss's
    gradient at the layer's output, which one run forwards and backwards through the float model gives. 0.5 is the norm
    itself; 0 leaves gradients out."""
    order: Literal["none", "full", "grouped"] = "full"
    """Order of columns: as they are; by falling diagonal of the Hessian (act-order; grids stay those of the original
    groups); or by it inside groups and among groups. None of them needs an index in the artifact."""
    static_groups: bool = False
    """Lay all grids over the original weights, and not over the weights that compensate for columns before."""
    ranges: Literal["minmax", "mse", "weighted-mse", "best"] = "weighted-mse"
    """How a grid is laid over the weights of a group: from end to end, or where the squared error is least;
    ``weighted-mse`` weighs each column by what an error in it costs after later columns have made up for it. ``best``
    solves from end to end as well and keeps the better for each row."""
    refine: Annotated[int, Ge(0)] = 0
    """Sweeps after solving, each of which rounds every column anew given all others (QuantEase)."""
    rescale: bool = False
    """Before each sweep, give groups the scales that are best for their codes."""
    guard: bool = True
    """Round rows to nearest, on grids from end to end, where that does better under the Hessian."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """To what the operands of matrix products in the walk and in the Hessian are rounded; sums are float32."""
    memory: Annotated[int, Ge(0)] = 2 << 30
    """Bytes of activations that are held in memory; more go to disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale and not self.refine:
            raise BitlowerError("gptq: rescale works before each sweep, and refine is 0", hint="add refine: 2")

    def data_runs(self, program: Program) -> int:
        """One walk, and a run forwards and backwards (twice as long as forwards) for gradients."""
        return 4 if self.gradient else 1

    def solver_bytes(self, workload: Workload) -> int:
        """The activations between two layers, at most ``memory``, and three Hessians of the widest input."""
        if not workload.widths:
            return 0
        between = workload.tokens * (max(workload.widths) + 2 * min(workload.widths)) * 4
        return min(self.memory, between) + 3 * max(workload.widths) ** 2 * 4

    def solver_operations(self, workload: Workload) -> float:
        """A Hessian for each input of width c (2 c² a token), its factor (2 c³), and error feedback (2 c² a row)."""
        hessians = sum(2.0 * width**2 * (workload.tokens + width) for width in workload.widths)
        return hessians + sum(2.0 * rows * columns**2 for rows, columns in workload.shapes)

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite all uncalibrated weights and leave a :class:`GptqReport`.

        Raises:
            BitlowerError: no calibration batches, a layer that no token reaches, a Hessian or weight that is not
                finite, or a granularity that error feedback cannot serve; the layer is named.
        """
        groups = uncalibrated_groups(program)
        nearest = [n for n in uncalibrated_weights(program.module) if not any(n in nodes for nodes in groups.values())]
        if groups and not context.calibration:
            raise BitlowerError("gptq needs calibration data", hint="give calibration batches, or use the pass `rtn`")
        walked = program
        if self.inputs == "float":
            walked, references = without_quantizers(program)
            groups = {references[linear]: quantizers for linear, quantizers in groups.items()}
        calibrate_weights(program.module, nearest, "minmax")
        if context.work is not None:
            context.work.mkdir(parents=True, exist_ok=True)
        gradients = token_gradients(program, _all_readers(groups), context) if groups and self.gradient else {}
        rewriter = _Rewriter(program, self, context, groups, gradients)
        walk(
            walked, list(groups), context.calibration, rewriter.visit, track=context.track, label="gptq",
            budget=self.memory, folder=context.work, bfloat16=self.precision == "bfloat16",
        )  # fmt: skip
        context.put(GptqReport(tuple(rewriter.rows)))
        return bool(groups or nearest)


def uncalibrated_groups(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The uncalibrated quantizers over weights, by the first linear of those that read the same activation."""
    first: dict[fx.Node, fx.Node] = {}
    groups: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for linear in linears(program.graph):
        quantizer = LinearNode(linear).weight
        if quantizer in seen or not is_uncalibrated(quantizer):
            continue
        seen.add(quantizer)
        if quantizer.meta["quantizer"].role == "linear-weight":
            groups.setdefault(first.setdefault(LinearNode(linear).x, linear), []).append(quantizer)
    return groups


class _Rewriter:
    """Solves a group of layers as the walk comes to it."""

    def __init__(
        self,
        program: Program,
        options: Gptq,
        context: Context,
        groups: dict[fx.Node, list[fx.Node]],
        gradients: dict[fx.Node, list[torch.Tensor]],
    ) -> None:
        self.module, self.options, self.context, self.groups = program.module, options, context, groups
        self.gradients = gradients
        self.rows: list[GptqRow] = []
        self.solver = GptqOptions(
            damping=options.damping, order=options.order, static_groups=options.static_groups, ranges=options.ranges,
            guard=options.guard, refine=options.refine, rescale=options.rescale,
        )  # fmt: skip

    def visit(self, linear: fx.Node, read: Read) -> None:
        """Rewrite all weights that read what ``linear`` reads."""
        quantizers = self.groups[linear]
        names = [_weight_name(node) for node in quantizers]
        stored = load_checkpoint(self.context.work, names[0])
        if stored is None:
            stored = self._solve(linear, quantizers, read)
            save_checkpoint(self.context.work, names[0], stored)
        for node, name in zip(quantizers, names, strict=True):
            self._write(node, *(stored.tensors[f"{part}.{name}"] for part in PARTS))
        self.rows += [GptqRow(**row | {"notes": tuple(row["notes"])}) for row in stored.rows]
        trim()

    def _solve(self, linear: fx.Node, quantizers: Sequence[fx.Node], read: Read) -> Stored:
        name = _weight_name(quantizers[0])
        options = self.options
        by_output = options.weighting == _UNIT_OUTPUT
        weighting = "none" if by_output else options.weighting
        hessian = Hessian(_columns(linear), weighting=weighting, precision=options.precision, name=name)
        for x, weights in _gathered(self._weighted(linear, quantizers, read)):
            hessian.add(x, weights / self._output_norms(x, quantizers) if by_output else weights)
        stored, columns = Stored({}, []), hessian.columns
        factors: dict[int, Factor] = {}
        for spec, nodes in _by_spec(quantizers).items():
            group = min(spec.granularity.group_size, columns) if spec.granularity.kind == "group" else columns
            if group not in factors:
                width = columns + -columns % group
                matrix = _padded(_padded(hessian.matrix(), width).T, width)
                factors[group] = factorize(matrix, damping=options.damping, order=options.order, group=group, name=name)
            self._solve_stack(stored, nodes, spec, factors[group], hessian.tokens)
        return stored

    def _weighted(
        self, linear: fx.Node, quantizers: Sequence[fx.Node], read: Read
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The tokens of each batch, ``[tokens, columns]``, and by what their weights are multiplied, ``[tokens]``."""
        dim = token_dim(LinearNode(linear).x.meta["type"].shape)
        for index, (x, batch) in enumerate(read(LinearNode(linear).x)):
            rows, weights = x.reshape(-1, x.shape[-1]), torch.ones(x.shape[:-1].numel())
            mask = token_mask(batch, dim)
            if mask is not None and mask.numel() == len(rows):
                weights = weights * mask.reshape(-1)
            parts = [self.gradients[n][index] for q in quantizers for n in q.users if n in self.gradients]
            if parts:
                weights = weights * torch.stack(parts).sum(0).pow(self.options.gradient).reshape(-1)
            yield rows, weights

    def _output_norms(self, x: torch.Tensor, quantizers: Sequence[fx.Node]) -> torch.Tensor:
        """``Σ ‖W x_t‖²`` over the weights that read ``x``, ``[tokens]``; infinite where all outputs are zero."""
        weights = (get_tensor(self.module, _weight_name(node)).detach().float() for node in quantizers)
        norms = torch.stack([functional.linear(x, weight).square().sum(1) for weight in weights]).sum(0)
        return torch.where(norms == 0, torch.inf, norms)

    def _solve_stack(
        self, stored: Stored, nodes: Sequence[fx.Node], spec: QuantSpec, factor: Factor, tokens: int
    ) -> None:
        """Solve weights of one spec that share an input as one, stacked along rows."""
        names = [_weight_name(node) for node in nodes]
        weights = [get_tensor(self.module, name).detach() for name in names]
        columns, grouped = weights[0].shape[1], spec.granularity.kind == "group"
        granularity = Granularity.per_group(factor.group) if grouped else spec.granularity
        stack = torch.cat(weights)
        solutions = [
            solve(_padded(rows.float(), factor.columns), factor, spec.grid, granularity, self.solver, name=names[0])
            for rows in torch.split(stack, max(1, _ELEMENTS // columns))
        ]
        codes = torch.cat([solution.codes[:, :columns] for solution in solutions])
        scales = [torch.cat([getattr(solution, key) for solution in solutions]) for key in PARTS[1:]]
        if grouped:
            scales = [spec.granularity.to_blocks(part, columns) for part in scales]
        start = 0
        for name, weight in zip(names, weights, strict=True):
            part = slice(start, start := start + len(weight))
            for key, tensor in zip(PARTS, (codes, *scales), strict=True):
                stored.tensors[f"{key}.{name}"] = tensor[part].contiguous()
            stored.rows.append(_row(name, spec, solutions, part, columns, tokens))
            release(weight)

    def _write(self, node: fx.Node, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """The weight on its grid takes the place of the old one, and the quantizer gets scale and zero point."""
        view = QuantizerNode(node)
        old = get_tensor(self.module, view.parameter)
        weight = like(numerics.values(codes, scale, zero), old)
        set_tensor(self.module, view.parameter, torch.nn.Parameter(weight, requires_grad=old.requires_grad))
        view.set_range(self.module, scale, zero)


def _row(
    name: str, spec: QuantSpec, solutions: Sequence[GptqSolution], part: slice, columns: int, tokens: int
) -> dict[str, Any]:
    """The report's row of the rows ``part`` of what was solved together."""
    nearest = [solution.rtn_loss for solution in solutions if solution.rtn_loss is not None]
    short = [f"{name}: {tokens} calibration tokens are few for {columns} columns"] if tokens < columns else []
    return {
        "weight": name,
        "spec": str(spec),
        "tokens": tokens,
        "loss": float(torch.cat([solution.loss for solution in solutions])[part].sum()),
        "rtn_loss": float(torch.cat(nearest)[part].sum()) if nearest else None,
        "kept_rows": int(torch.cat([solution.rtn_mask for solution in solutions])[part].sum()),
        "damping": solutions[0].damping,
        "notes": [*solutions[0].notes, *short],
    }


def _padded(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """``matrix`` with zeros after its columns up to so many."""
    return functional.pad(matrix, (0, columns - matrix.shape[1])) if matrix.shape[1] < columns else matrix


def _gathered(
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches put together until they hold enough tokens for one product."""
    buffer: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in parts:
        buffer.append(part)
        if sum(len(weights) for _, weights in buffer) >= _TOKENS:
            yield torch.cat([rows for rows, _ in buffer]), torch.cat([weights for _, weights in buffer])
            buffer = []
    if buffer:
        yield torch.cat([rows for rows, _ in buffer]), torch.cat([weights for _, weights in buffer])


def _all_readers(groups: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """Every linear whose weight is to be rewritten."""
    return [user for quantizers in groups.values() for node in quantizers for user in node.users]


def _by_spec(quantizers: Sequence[fx.Node]) -> dict[QuantSpec, list[fx.Node]]:
    groups: dict[QuantSpec, list[fx.Node]] = {}
    for node in quantizers:
        groups.setdefault(node.meta["quantizer"].spec, []).append(node)
    return groups


def _weight_name(quantizer: fx.Node) -> str:
    return QuantizerNode(quantizer).parameter


def _columns(linear: fx.Node) -> int:
    return int(LinearNode(linear).x.meta["type"].shape[-1])
