"""What a run will give and take, before any work: the size of the artifact, peak memory, time, bits per tensor.

The model is traced and the passes that place quantizers run on it (they need no data); nothing is calibrated. From the
placed quantizers follow the bytes of every tensor (:mod:`bitlower.backends.sizes`), and whether the target can
hold it. Memory and time are foreseen by :mod:`bitlower.tools.planning.costs`. Sizes are::

    model file = Σ codes + Σ scales and zero points + Σ tensors that stay float + overhead of nodes and tensors
    artifact   = model file + tokenizer + FOLDER_BYTES + ROW_BYTES · quantizers + SEEN_BYTES · tensors with statistics
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import fx

from bitlower.backends.base import Backend
from bitlower.backends.registry import make_backend
from bitlower.backends.sizes import Sizes, stored_values
from bitlower.frontends import load
from bitlower.frontends.trace_cache import is_kept
from bitlower.ir import Program
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.passes import Cache, Context, Contract, Pass, PassManager, format_pipeline, training_steps, trains
from bitlower.passes.quantizers.quantize import PlacementReport
from bitlower.tools.data.sources import Amount
from bitlower.tools.planning.costs import Costs, Load, unforeseen
from bitlower.tools.planning.training_costs import Lesson
from bitlower.tools.recipes.recipe import Recipe
from bitlower.tools.render import format_bytes, make_table
from bitlower.tools.runs.flow import recipe_job
from bitlower.tools.runs.heads import head_notes
from bitlower.tools.runs.job import RunOptions, traces_in
from bitlower.tools.runs.standard import DEFAULT, standard_exports, standard_passes

KEPT = "the trace of the model is in the cache: the run reads its weights alone"
FOLDER_BYTES, ROW_BYTES, SEEN_BYTES = 6_000, 700, 2_200
"""Files of an artifact that hardly depend on the model, those that have a row for each quantizer, and the statistics of
a tensor, which weights have, and values where there are held-out data: measured."""


@dataclass(frozen=True)
class TensorPlan:
    """One parameter: its bits and bytes in the artifact; ``reason`` says why it stays float.

    ``bits_per_weight`` counts scales, zero points and padding in.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    spec: str
    float_bytes: int
    bytes: int
    bits_per_weight: float
    reason: str


@dataclass(frozen=True)
class ActivationPlan:
    """One value: what it is rounded to, or why it is not."""

    tensor: str
    role: str
    path: str
    spec: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A prediction; the formulas stand at the top of the module.

    Args:
        model: as the user wrote it.
        pipeline: the passes as text.
        target: the backend that sizes are for, with its options.
        tensors: every parameter that the program uses.
        activations: every value that could be rounded.
        notes: what becomes of output heads, and what could not be foreseen.
        file_bytes: of the model's weights and graph.
        artifact_bytes: of the folder.
        float_bytes: of all tensors of the float model.
        peak_bytes: of resident memory.
        seconds: from start to end.
        at_least: whether memory and time are no more than lower bounds, for the reason that a note gives.
    """

    model: str
    pipeline: str
    target: str
    tensors: tuple[TensorPlan, ...]
    activations: tuple[ActivationPlan, ...]
    notes: tuple[str, ...]
    file_bytes: int
    artifact_bytes: int
    float_bytes: int
    peak_bytes: int
    seconds: float
    at_least: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """The parameters, what becomes of the values by role, and the sums."""
        tensors = [
            (t.name, str(list(t.shape)), t.bits, t.spec, t.bytes, round(t.bits_per_weight, 2), t.reason)
            for t in self.tensors
        ]
        columns = ("parameter", "shape", "bits", "quantized to", "bytes", "bits a weight", "why float")
        roles = Counter((a.role, a.spec or "float", a.reason) for a in self.activations)
        bound = "at least" if self.at_least else "about"
        sums = [
            ("pipeline", self.pipeline),
            ("target", self.target),
            ("model file", f"{format_bytes(self.float_bytes)} → {format_bytes(self.file_bytes)}"),
            ("whole artifact", format_bytes(self.artifact_bytes)),
            ("peak memory", f"{bound} {format_bytes(self.peak_bytes)}"),
            ("time", f"{bound} {self.seconds:.0f} s"),
            *(("note", note) for note in self.notes),
        ]
        rows = [(role, count, spec, reason) for (role, spec, reason), count in roles.items()]
        return (
            make_table("parameters", columns, tensors),
            make_table("values", ("role", "count", "rounded to", "why not"), rows),
            make_table(f"plan for {self.model}", ("", ""), sums),
        )


def plan_recipe(recipe: Recipe, options: RunOptions | None = None) -> Plan:
    """Predict what :func:`~bitlower.tools.runs.flow.run_recipe` will give and take.

    Args:
        recipe: what will run.
        options: of the run, which looks for results of passes and for traces in its cache, if it has one.

    Raises:
        BitlowerError: bad input, as the run itself would find.
    """
    job, cache = recipe_job(recipe), (options or RunOptions()).cache
    job.check()
    program, trace_cached = _loaded(job.load, cache)
    decoder = program.task == TEXT_GENERATION
    amount = Amount.of(recipe.calibration, decoder) if recipe.calibration else Amount.make(None, None, decoder)
    data = job.read(program)
    lesson = Lesson.of(data) if any(map(trains, job.passes)) else None
    manager = PassManager(job.passes, cache=Cache(cache)) if cache else None
    cached = len(manager.cached(program, job.context(data))) if manager else 0
    return make_plan(
        program, job.passes, Load.of(amount, program), job.exports, lesson, trace_cached=trace_cached, cached=cached
    )


def plan_model(
    model: str,
    scheme: str,
    *,
    algorithm: str | None = None,
    formats: Sequence[str] = (),
    samples: int | None = None,
    max_length: int | None = None,
    task: str | None = None,
    ignore: Sequence[str] = (),
    options: RunOptions | None = None,
) -> Plan:
    """Predict what ``bitlower quantize`` will give and take, with calibration data that are not at hand yet.

    Raises:
        BitlowerError: bad input.
    """
    passes = standard_passes(scheme, ignore, algorithm=algorithm, formats=formats)
    exports = standard_exports(scheme, formats)
    cache = (options or RunOptions()).cache
    program, trace_cached = _loaded(lambda traces: load(model, task=task, traces=traces), cache)
    amount = Amount.make(samples, max_length, program.task == TEXT_GENERATION)
    return make_plan(program, passes, Load.of(amount, program), exports, trace_cached=trace_cached)


def _loaded(read: Callable[[Path | None], Program], cache: Path | None) -> tuple[Program, bool]:
    """The float Program, and whether its trace lies in the cache now: a run after the plan reads weights alone."""
    folder, start = traces_in(cache), time.time()
    program = read(folder)
    return program, folder is not None and is_kept(folder, start)


def make_plan(
    program: Program,
    passes: tuple[Pass, ...],
    data: Load,
    exports: Sequence[Backend] = (),
    lesson: Lesson | None = None,
    *,
    trace_cached: bool = False,
    cached: int = 0,
) -> Plan:
    """Predict a run of ``passes`` on the float ``program``; tensors and model file are those of the first export.

    Args:
        program: traced.
        passes: all of the run.
        data: what it calibrates on.
        exports: what it writes.
        lesson: what passes train on.
        trace_cached: whether the trace is in the cache, so that the run does not make one.
        cached: how many of the first passes have their results there.

    Raises:
        BitlowerError: a pattern matches nothing, a granularity does not fit a tensor, or a target cannot hold one.
    """
    float_bytes, context = program.size_bytes(), Context()
    exports = exports or (make_backend(DEFAULT),)
    early = [pass_ for pass_ in passes if pass_.runs_in_plan()]
    placed = PassManager(early, verify=False).run(program, context)
    for backend in exports:
        backend.check_fits(placed)
    rows = context[PlacementReport].rows if PlacementReport in context.results else ()
    reasons, targets = {row.tensor: row.reason for row in rows}, [backend.sizes(placed) for backend in exports]
    planned = [_tensor_plans(placed, reasons, target) for target in targets]
    tensors = planned[0]
    names = {tensor.name for tensor in tensors}
    values = [ActivationPlan(r.tensor, r.role, r.path, r.spec, r.reason) for r in rows if r.tensor not in names]
    files = [
        sum(tensor.bytes for tensor in tensors) + target.overhead(placed)
        for tensors, target in zip(planned, targets, strict=True)
    ]
    beside = sum(map(len, program.assets.values())) + FOLDER_BYTES + _record_bytes(placed, data)
    later = [pass_ for pass_ in passes if pass_ not in early]
    costs = Costs(program, placed, passes, data, exports, lesson, trace_cached, cached, files[0])
    unknown = tuple(unforeseen(placed, passes, exports))
    return Plan(
        program.source,
        format_pipeline(passes),
        str(exports[0]),
        tensors,
        tuple(values),
        (*head_notes(placed), *_cache_notes(passes[:cached], trace_cached), *unknown, *_notes(later, exports)),
        files[0],
        sum(files) + beside * len(files),
        float_bytes,
        costs.peak_bytes(),
        costs.seconds(),
        bool(unknown),
    )


def _record_bytes(placed: Program, data: Load) -> int:
    """Of what is recorded of each quantizer."""
    views = [QuantizerNode(node) for node, _ in placed.quantizers()]
    seen = views if data.held_out else [view for view in views if view.rounds_parameter]
    return ROW_BYTES * len(views) + SEEN_BYTES * len(seen)


def _tensor_plans(program: Program, reasons: dict[str, str], target: Sizes) -> tuple[TensorPlan, ...]:
    """Every parameter and constant that is no scale or zero point, each storage once."""
    return tuple(
        _tensor_plan(name, tensor, quantizers, readers, reasons.get(name, ""), target)
        for name, tensor, quantizers, readers in stored_values(program)
    )


def _tensor_plan(
    name: str, tensor: torch.Tensor, quantizers: list[fx.Node], readers: list[fx.Node], reason: str, target: Sizes
) -> TensorPlan:
    full, count, shape = tensor.numel() * tensor.element_size(), max(tensor.numel(), 1), tuple(tensor.shape)
    float_bytes = target.floats(tensor, readers)
    if not quantizers:
        bits, reason = 8 * target.floats(tensor) // count, reason or "no role in the scheme"
        return TensorPlan(name, shape, bits, "", full, float_bytes, 8 * float_bytes / count, reason)
    quantizer = quantizers[0].meta["quantizer"]
    users = [user for node in quantizers for user in node.users]
    size = target.quantized(quantizer, shape, users)
    also = "" if len(quantizers) == len(readers) else "and in float, for another reader"
    size += float_bytes if also else 0
    return TensorPlan(name, shape, quantizer.spec.grid.bits, str(quantizer.spec), full, size, 8 * size / count, also)


def _cache_notes(cached: Sequence[Pass], trace_cached: bool) -> Iterator[str]:
    """What the run takes from the cache."""
    if trace_cached:
        yield KEPT
    if cached:
        yield f"results of passes that are in the cache: {', '.join(pass_.name for pass_ in cached)}"


def _notes(later: Sequence[Pass], exports: Sequence[Backend]) -> Iterator[str]:
    """What of the passes that did not run cannot be foreseen."""
    for pass_ in later:
        if pass_.contract is not Contract.ANALYSIS and not (pass_.keeps_sizes or training_steps(pass_, 1)):
            yield f"{pass_.name} needs data and was not run; sizes are as without it"
    for backend in exports[1:]:
        yield f"{backend.name} is written as well; tensors and model file are as {exports[0].name} writes them"
