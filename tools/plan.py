"""What a run will give and take, before any work: the size of the artefact, peak memory, time, bits per tensor.

The model is traced and the passes that place quantizers run on it (they need no data); nothing is calibrated. From the
placed quantizers follow the bytes of every tensor. The formulas, with S the bytes of the float model's tensors::

    model file  = Σ codes + Σ scales and zero points + Σ tensors that stay float + ENTRY_BYTES · (nodes + tensors)
    artefact    = model file + tokenizer + FOLDER_BYTES + ROW_BYTES · quantizers
    peak memory = BASE_BYTES + COPIES · S + activations of one batch
    seconds     = fixed part + passes over the data · FLOP of the data / measured FLOP rate

A code takes one byte up to 8 bits and two above; a scale takes 4 bytes, the zero point of an asymmetric grid those of
its code. The constants were measured on BERTs of 4 to 12 layers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import fx

from bitlower.frontends import load
from bitlower.ir import Level, Program, Quantizer, get_tensor
from bitlower.ir.dataflow import linears, parameter_of, weight_operand
from bitlower.passes import Context, Contract, Pass, PassManager, format_pipeline
from bitlower.passes.quantize import PlacementReport
from bitlower.tools.flow import recipe_job, standard_passes
from bitlower.tools.recipe import Recipe
from bitlower.tools.render import format_bytes, make_table

ENTRY_BYTES = 106
FOLDER_BYTES = 4_000
ROW_BYTES = 700
BASE_BYTES = 680_000_000
COPIES = 6.3
FIXED_SECONDS = 12.0


@dataclass(frozen=True)
class TensorPlan:
    """One parameter: its bits and bytes in the artefact; ``reason`` says why it stays float."""

    name: str
    shape: tuple[int, ...]
    bits: int
    spec: str
    float_bytes: int
    bytes: int
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
        tensors: every parameter that the program uses.
        activations: every value that could be rounded.
        notes: what could not be foreseen.
        file_bytes: of ``model.onnx`` with its external data.
        artefact_bytes: of the folder.
        float_bytes: of all tensors of the float model.
        peak_bytes: of resident memory.
        seconds: from start to end.
    """

    model: str
    pipeline: str
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
        tensors = [(t.name, str(list(t.shape)), t.bits, t.spec, t.bytes, t.reason) for t in self.tensors]
        columns = ("parameter", "shape", "bits", "quantized to", "bytes", "why float")
        roles = Counter((a.role, a.spec or "float", a.reason) for a in self.activations)
        sums = [
            ("pipeline", self.pipeline),
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


def plan_recipe(recipe: Recipe) -> Plan:
    """Predict what :func:`~bitlower.tools.flow.run_recipe` will give and take.

    Raises:
        BitlowerError: bad input, as the run itself would find.
    """
    job = recipe_job(recipe)
    job.check()
    section = recipe.calibration
    return make_plan(job.load(), job.passes, Load(section.samples, section.max_length, section.batch_size))


def plan_model(model: str, scheme: str, *, samples: int = 128, max_length: int = 128, task: str | None = None) -> Plan:
    """Predict what ``bitlower quantize`` will give and take.

    Raises:
        BitlowerError: bad input.
    """
    return make_plan(load(model, task=task), standard_passes(scheme), Load(samples, max_length))


def make_plan(program: Program, passes: tuple[Pass, ...], data: Load) -> Plan:
    """Predict a run of ``passes`` on the float ``program``.

    Raises:
        BitlowerError: a pattern matches nothing, or a granularity does not fit a tensor.
    """
    float_bytes, context = program.size_bytes(), Context()
    early = [pass_ for pass_ in passes if pass_.name == "clean" or pass_.ensures is Level.SIMULATED]
    placed = PassManager(early, verify=False).run(program, context)
    rows = context[PlacementReport].rows if PlacementReport in context.results else ()
    tensors = _tensor_plans(placed, {row.tensor: row.reason for row in rows})
    names = {tensor.name for tensor in tensors}
    values = [ActivationPlan(r.tensor, r.role, r.path, r.spec, r.reason) for r in rows if r.tensor not in names]
    file_bytes = sum(t.bytes for t in tensors) + ENTRY_BYTES * _entries(placed)
    rows_bytes = ROW_BYTES * len(list(placed.quantizers()))
    return Plan(
        program.source,
        format_pipeline(passes),
        tensors,
        tuple(values),
        tuple(_notes([pass_ for pass_ in passes if pass_ not in early])),
        file_bytes,
        file_bytes + sum(map(len, program.assets.values())) + FOLDER_BYTES + rows_bytes,
        float_bytes,
        _peak_bytes(program, data),
        _seconds(program, passes, data),
    )


def _tensor_plans(program: Program, reasons: dict[str, str]) -> tuple[TensorPlan, ...]:
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
        plans.append(_tensor_plan(program, name, tensor, quantizers, len(readers), reasons.get(name, "")))
    return tuple(plans)


def _tensor_plan(
    program: Program, name: str, tensor: torch.Tensor, quantizers: list[fx.Node], readers: int, reason: str
) -> TensorPlan:
    full = tensor.numel() * tensor.element_size()
    shape = tuple(tensor.shape)
    if not quantizers:
        return TensorPlan(name, shape, tensor.element_size() * 8, "", full, full, reason or "no role in the scheme")
    node = quantizers[0]
    quantizer: Quantizer = node.meta["quantizer"]
    grid = quantizer.spec.grid
    scale = node.args[1]
    assert isinstance(scale, fx.Node)
    each = 4 if grid.symmetric else 4 + code_bytes(1, grid.bits)
    size = code_bytes(tensor.numel(), grid.bits) + each * get_tensor(program.module, str(scale.target)).numel()
    also = "" if len(quantizers) == readers else "and in float, for another reader"
    return TensorPlan(name, shape, grid.bits, str(quantizer.spec), full, size + bool(also) * full, also)


def code_bytes(count: int, bits: int) -> int:
    """The bytes of ``count`` codes: one each up to 8 bits, two above; fewer bits are not packed."""
    return count * (1 if bits <= 8 else 2)


def _entries(program: Program) -> int:
    """The nodes and the stored tensors of the graph; the exported one has about as many."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return len(nodes) + len({node.target for node in program.graph.nodes if node.op == "get_attr"})


def _notes(later: Sequence[Pass]) -> Iterator[str]:
    """What of the passes that did not run cannot be foreseen."""
    for pass_ in later:
        if pass_.contract is not Contract.ANALYSIS and pass_.name not in ("calibrate", "lower-integer"):
            yield f"{pass_.name} needs data and was not run; sizes are as without it"


def _peak_bytes(program: Program, data: Load) -> int:
    widest = max((node.meta["type"].shape[-1] for node in linears(program.graph)), default=0)
    values = data.batch_size * data.max_length * (widest + data.max_length * _heads(program)) * 4
    return int(BASE_BYTES + COPIES * program.size_bytes() + values)


def _heads(program: Program) -> int:
    return int(program.config.get("num_attention_heads", 1))


def _seconds(program: Program, passes: Sequence[Pass], data: Load) -> float:
    """Fixed costs, and the floating-point operations of all runs over the data at the measured rate."""
    parameters = [parameter_of(weight_operand(node)) for node in linears(program.graph)]
    weights = sum(get_tensor(program.module, str(node.target)).numel() for node in parameters if node is not None)
    lossy = len([pass_ for pass_ in passes if pass_.contract is Contract.LOSSY])
    runs = len(passes) * 0.25 + lossy * 0.5
    return FIXED_SECONDS + runs * 2.0 * weights * data.samples * data.max_length / _flop_rate()


def _flop_rate() -> float:
    """Floating-point operations a second of this machine, by multiplying matrices for a moment."""
    matrix = torch.ones(512, 512)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(8):
        matrix @ matrix
    return 8 * 2 * 512**3 / (time.perf_counter() - start)
