"""What a run will give and take, before any work: the size of the artefact, peak memory, time, bits per tensor.

The model is traced and the passes that place quantizers run on it (they need no data); nothing is calibrated. From the
placed quantizers follow the bytes of every tensor (:mod:`bitlower.tools._sizes`), and whether the target can hold it.
The formulas, with S the bytes of the float model's tensors::

    model file  = Σ codes + Σ scales and zero points + Σ tensors that stay float + overhead of nodes and tensors
    artefact    = model file + tokenizer + FOLDER_BYTES + ROW_BYTES · quantizers
    peak memory = BASE_BYTES + COPIES · S + activations of one batch
    seconds     = fixed part + floating-point operations of the data and the solver / measured rate

The constants were measured on BERTs of 4 to 12 layers. With ``gptq`` there come to the peak the activations between two
layers for all calibration data, at most the memory that the pass may hold, and three Hessians of the widest input; to
the operations one forward run, a Hessian for each input of width c (2 c² a token), its factor (2 c³) and error feedback
(2 c² a row). With ``adaround`` there come to the peak the activations of two walks, the float weights of linears, and
LAYER_COPIES of the largest layer with the tokens that it is learned on; to the operations, for each step and weight, 4
for each token of the step (products forward and backward) and STEP_WORK (what is done weight by weight, in the time of
so many operations).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import fx

from bitlower.frontends import load
from bitlower.ir import Level, Program, get_tensor
from bitlower.ir.dataflow import activation_operand, linears, parameter_of, weight_operand
from bitlower.passes import Context, Contract, Pass, PassManager, format_pipeline
from bitlower.passes.adaround import Adaround
from bitlower.passes.assign_precision import AssignPrecision
from bitlower.passes.gptq import Gptq
from bitlower.passes.quantize import PlacementReport
from bitlower.tools import _backends
from bitlower.tools._calibration import TEXTS, Amount
from bitlower.tools._sizes import Target, overhead_bytes, stored_bytes
from bitlower.tools._standard import standard_exports, standard_passes
from bitlower.tools.flow import recipe_job
from bitlower.tools.language_model import TASK
from bitlower.tools.recipe import Recipe
from bitlower.tools.render import format_bytes, make_table

FOLDER_BYTES = 4_000
ROW_BYTES = 700
BASE_BYTES = 680_000_000
COPIES = 6.3
FIXED_SECONDS = 12.0
LAYER_COPIES = 14
STEP_WORK = 1600.0
_SIZE_KEEPING = ("adaround", "calibrate", "correct-bias", "fuse", "gptq", "rtn", "lower-integer")


@dataclass(frozen=True)
class TensorPlan:
    """One parameter: its bits and bytes in the artefact; ``reason`` says why it stays float.

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
        notes: what could not be foreseen.
        file_bytes: of the model's weights and graph.
        artefact_bytes: of the folder.
        float_bytes: of all tensors of the float model.
        peak_bytes: of resident memory.
        seconds: from start to end.
    """

    model: str
    pipeline: str
    target: str
    tensors: tuple[TensorPlan, ...]
    activations: tuple[ActivationPlan, ...]
    notes: tuple[str, ...]
    file_bytes: int
    artefact_bytes: int
    float_bytes: int
    peak_bytes: int
    seconds: float

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
        sums = [
            ("pipeline", self.pipeline),
            ("target", self.target),
            ("model file", f"{format_bytes(self.float_bytes)} → {format_bytes(self.file_bytes)}"),
            ("whole artefact", format_bytes(self.artefact_bytes)),
            ("peak memory", format_bytes(self.peak_bytes)),
            ("time", f"about {self.seconds:.0f} s"),
            *(("note", note) for note in self.notes),
        ]
        rows = [(role, count, spec, reason) for (role, spec, reason), count in roles.items()]
        return (
            make_table("parameters", columns, tensors),
            make_table("values", ("role", "count", "rounded to", "why not"), rows),
            make_table(f"plan for {self.model}", ("", ""), sums),
        )


@dataclass(frozen=True)
class Load:
    """How much data a run reads: ``samples`` texts of at most ``max_length`` tokens, ``batch_size`` at a time."""

    samples: int
    max_length: int
    batch_size: int = 8

    @property
    def tokens(self) -> int:
        """Of all of them together."""
        return self.samples * self.max_length

    @classmethod
    def of(cls, amount: Amount, program: Program) -> Load:
        """``amount`` for ``program``."""
        return cls(amount.samples or TEXTS, amount.length(program), amount.batch_size)


Exports = Sequence[tuple[str, Mapping[str, Any]]]


def plan_recipe(recipe: Recipe) -> Plan:
    """Predict what :func:`~bitlower.tools.flow.run_recipe` will give and take.

    Raises:
        BitlowerError: bad input, as the run itself would find.
    """
    job = recipe_job(recipe)
    job.check()
    program = job.load()
    decoder = program.task == TASK
    amount = Amount.of(recipe.calibration, decoder) if recipe.calibration else Amount.make(None, None, decoder)
    return make_plan(program, job.passes, Load.of(amount, program), job.exports)


def plan_model(
    model: str,
    scheme: str,
    *,
    algorithm: str | None = None,
    formats: Sequence[str] = (),
    samples: int | None = None,
    max_length: int | None = None,
    task: str | None = None,
) -> Plan:
    """Predict what ``bitlower quantize`` will give and take.

    Raises:
        BitlowerError: bad input.
    """
    passes, exports = standard_passes(scheme, algorithm=algorithm, formats=formats), standard_exports(scheme, formats)
    program = load(model, task=task)
    amount = Amount.make(samples, max_length, program.task == TASK)
    return make_plan(program, passes, Load.of(amount, program), exports)


def make_plan(program: Program, passes: tuple[Pass, ...], data: Load, exports: Exports = (("onnx-qdq", {}),)) -> Plan:
    """Predict a run of ``passes`` on the float ``program``; tensors and model file are those of the first export.

    Raises:
        BitlowerError: a pattern matches nothing, a granularity does not fit a tensor, or a target cannot hold one.
    """
    float_bytes, context = program.size_bytes(), Context()
    early = [pass_ for pass_ in passes if _is_early(pass_)]
    placed = PassManager(early, verify=False).run(program, context)
    for name, options in exports:
        _backends.check_program(name, placed, options)
    rows = context[PlacementReport].rows if PlacementReport in context.results else ()
    reasons, targets = {row.tensor: row.reason for row in rows}, [Target.of(placed, *export) for export in exports]
    planned = [_tensor_plans(placed, reasons, target) for target in targets]
    tensors = planned[0]
    names = {tensor.name for tensor in tensors}
    values = [ActivationPlan(r.tensor, r.role, r.path, r.spec, r.reason) for r in rows if r.tensor not in names]
    files = [
        sum(tensor.bytes for tensor in tensors) + overhead_bytes(placed, target)
        for tensors, target in zip(planned, targets, strict=True)
    ]
    beside = sum(map(len, program.assets.values())) + FOLDER_BYTES + ROW_BYTES * len(list(placed.quantizers()))
    later = [pass_ for pass_ in passes if pass_ not in early]
    return Plan(
        program.source,
        format_pipeline(passes),
        str(targets[0]),
        tensors,
        tuple(values),
        tuple(_notes(later, exports)),
        files[0],
        sum(files) + beside * len(files),
        float_bytes,
        _peak_bytes(program, passes, data),
        _seconds(program, passes, data),
    )


def _tensor_plans(program: Program, reasons: dict[str, str], target: Target) -> tuple[TensorPlan, ...]:
    """Every parameter and constant that is no scale or zero point, each storage once."""
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), []).extend(node.users)
    plans, seen = [], set()
    for name, readers in users.items():
        tensor = get_tensor(program.module, name)
        quantizers = [n for n in readers if "quantizer" in n.meta]
        if any(getattr(n.args[0], "target", None) != name for n in quantizers) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        plans.append(_tensor_plan(name, tensor, quantizers, readers, reasons.get(name, ""), target))
    return tuple(plans)


def _tensor_plan(
    name: str, tensor: torch.Tensor, quantizers: list[fx.Node], readers: list[fx.Node], reason: str, target: Target
) -> TensorPlan:
    full, count, shape = tensor.numel() * tensor.element_size(), max(tensor.numel(), 1), tuple(tensor.shape)
    kept = target.float_bytes(tensor, readers)
    if not quantizers:
        bits, reason = 8 * target.float_bytes(tensor) // count, reason or "no role in the scheme"
        return TensorPlan(name, shape, bits, "", full, kept, 8 * kept / count, reason)
    quantizer = quantizers[0].meta["quantizer"]
    users = [user for node in quantizers for user in node.users]
    size = stored_bytes(quantizer, shape, target, users)
    also = "" if len(quantizers) == len(readers) else "and in float, for another reader"
    size += kept if also else 0
    return TensorPlan(name, shape, quantizer.spec.grid.bits, str(quantizer.spec), full, size, 8 * size / count, also)


def _is_early(pass_: Pass) -> bool:
    """Whether ``pass_`` places quantizers, or has to run before, and needs no data."""
    if isinstance(pass_, AssignPrecision):
        return pass_.set != "none"
    return pass_.name == "clean" or pass_.ensures is Level.SIMULATED


def _notes(later: Sequence[Pass], exports: Exports) -> Iterator[str]:
    """What of the passes that did not run cannot be foreseen."""
    for pass_ in later:
        if pass_.contract is not Contract.ANALYSIS and pass_.name not in _SIZE_KEEPING:
            yield f"{pass_.name} needs data and was not run; sizes are as without it"
    for name, _ in exports[1:]:
        yield f"{name} is written as well; tensors and model file are as {exports[0][0]} writes them"


def _peak_bytes(program: Program, passes: Sequence[Pass], data: Load) -> int:
    widest = max((node.meta["type"].shape[-1] for node in linears(program.graph)), default=0)
    values = data.batch_size * data.max_length * (widest + data.max_length * _heads(program)) * 4
    return int(BASE_BYTES + COPIES * program.size_bytes() + values + _solver_bytes(program, passes, data))


def _solver_bytes(program: Program, passes: Sequence[Pass], data: Load) -> int:
    """What ``gptq`` or ``adaround`` holds besides the model; 0 without them.

    Both hold activations between two layers: the first Hessians too; the second those of two walks, the float weights,
    and what a layer is learned with.
    """
    widths, shapes, found = _widths(program), [tuple(weight.shape) for weight in _weights(program)], 0
    for pass_ in passes if widths else ():
        if isinstance(pass_, Gptq | Adaround):
            walks = 1 if isinstance(pass_, Gptq) else 2
            found += min(pass_.memory, walks * data.tokens * (max(widths) + 2 * min(widths)) * 4)
        if isinstance(pass_, Gptq):
            found += 3 * max(widths) ** 2 * 4
        if isinstance(pass_, Adaround):
            layer = max(LAYER_COPIES * r * c + 3 * min(pass_.tokens, data.tokens) * (r + c) for r, c in shapes)
            found += 4 * (sum(r * c for r, c in shapes) + layer)
    return int(found)


def _widths(program: Program) -> list[int]:
    """The widths of the activations that linears read, each activation once."""
    inputs = dict.fromkeys(activation_operand(node) for node in linears(program.graph))
    return [int(node.meta["type"].shape[-1]) for node in inputs]


def _heads(program: Program) -> int:
    return int(program.config.get("num_attention_heads") or 1)


def _seconds(program: Program, passes: Sequence[Pass], data: Load) -> float:
    """Fixed costs, and the operations of all runs over the data and of the solvers, at the measured rate."""
    shapes = [tuple(weight.shape) for weight in _weights(program)]
    lossy = [pass_ for pass_ in passes if pass_.contract is Contract.LOSSY]
    runs = len(passes) * 0.25 + len(lossy) * 0.5
    work = runs * 2.0 * sum(rows * columns for rows, columns in shapes) * data.tokens
    if any(isinstance(pass_, Gptq) for pass_ in passes):
        work += sum(2.0 * width**2 * (data.tokens + width) for width in _widths(program))
        work += sum(2.0 * rows * columns**2 for rows, columns in shapes)
    for pass_ in passes:
        if isinstance(pass_, Adaround):
            steps = pass_.iterations * (4.0 * pass_.batch + STEP_WORK)
            work += steps * sum(rows * columns for rows, columns in shapes)
    return FIXED_SECONDS + work / _flop_rate()


def _weights(program: Program) -> list[torch.Tensor]:
    """The parameters of linears."""
    nodes = [parameter_of(weight_operand(node)) for node in linears(program.graph)]
    found = [get_tensor(program.module, str(node.target)) for node in nodes if node is not None]
    return [tensor for tensor in found if tensor.dim() == 2]


def _flop_rate() -> float:
    """Floating-point operations a second of this machine, by multiplying matrices for a moment."""
    matrix = torch.ones(512, 512)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(8):
        matrix @ matrix
    return 8 * 2 * 512**3 / (time.perf_counter() - start)
