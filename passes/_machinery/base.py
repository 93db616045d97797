"""What a pass is, and what it may ask of the pipeline that runs it."""

from __future__ import annotations

import enum
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch

from bitlower.ir import Batch, BitlowerError, Level, Program
from bitlower.ir.charts import Topic
from bitlower.ir.plugins.kinds import check_bounds
from bitlower.ir.plugins.parameters import changed_fields
from bitlower.passes._machinery.workload import BlockSchedule, Workload

T = TypeVar("T")


class Contract(enum.StrEnum):
    """What a pass promises about the numbers: the pipeline holds it to that."""

    ANALYSIS = "analysis"  # the program is not changed; a typed result is left in the context
    EXACT = "exact"  # outputs are equal within float tolerance, checked on real batches
    LOSSY = "lossy"  # outputs may change; the ledger says by how much


@dataclass
class Context:
    """What a pass may use besides the program.

    Args:
        calibration: input batches for estimating ranges.
        evaluation: held-out input batches, for the ledger and for checks; never calibrated on.
        seed: the root of all randomness.
        work: a folder for scratch files and block-level checkpoints; None where nothing may be written.
        track: wraps an iterable with a progress display, ``track(items, "label")``; of a label that is no string its
            ``str`` is shown, anew at each item.
        results: what passes left, by type.
        training: batches to train on; beside the model's inputs they may have ``labels``, ``[batch]``.
        held_out: the same to choose the best step by; never trained on.
        reference: the float model that was quantized: what the program was before it got quantizers.
    """

    calibration: Sequence[Batch] = ()
    evaluation: Sequence[Batch] = ()
    seed: int = 0
    work: Path | None = None
    track: Callable[[Iterable[Any], object], Iterator[Any]] = field(default=lambda items, label: iter(items))
    results: dict[type, Any] = field(default_factory=dict)
    training: Sequence[Batch] = ()
    held_out: Sequence[Batch] = ()
    reference: Program | None = None

    def __getitem__(self, kind: type[T]) -> T:
        """The result of type ``kind`` that an earlier pass left.

        Raises:
            BitlowerError: there is none, or a later pass invalidated it.
        """
        if kind not in self.results:
            raise BitlowerError(
                f"no {kind.__name__} at this point of the pipeline", hint="run its analysis just before"
            )
        return self.results[kind]  # type: ignore[no-any-return]

    def put(self, result: object) -> None:
        """Leave ``result`` for later passes; one of each type is kept.

        It is a :class:`~bitlower.passes._machinery.report.Report`, or another frozen dataclass of plain data, which is
        not shown. It is void when a pass changes the program, unless it is a
        :class:`~bitlower.passes._machinery.report.Record`.
        """
        self.results[type(result)] = result

    def generator(self, name: str) -> torch.Generator:
        """A random generator that depends on the seed and ``name`` alone."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Pass:
    """A step from Program to Program: a frozen dataclass whose fields are its parameters.

    Subclass it, decorate the class with ``@dataclass(frozen=True)``, set ``name`` and write ``run``. Put the logic in
    plain functions and let ``run`` call them. One file ``passes/<family>/<name>.py`` holds one pass.

    Parameters have defaults. Their types are bool, int, float, str, an enum, ``Literal``, ``tuple`` of these,
    ``X | None``, or a class with ``parse``, ``from_dict`` or ``from_list``. ``Annotated[float, Interval(gt=0, le=1)]``
    sets bounds (:mod:`~bitlower.ir.plugins.kinds`). A ``__post_init__`` of your own begins with
    ``super().__post_init__()``.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[Level]] = frozenset(Level)
    """The levels that the pass takes."""
    ensures: ClassVar[Level | None] = None
    """The level that it returns; None: the same."""
    contract: ClassVar[Contract] = Contract.LOSSY
    preserves: ClassVar[frozenset[type]] = frozenset()
    """The facts about the program in the context that stay true although the pass changed it."""
    rewrites_weights: ClassVar[bool] = False
    """Whether it gives weights other values, so that those before are held as well; for predictions of memory."""
    keeps_sizes: ClassVar[bool] = False
    """Whether the artifact is as large as without it; for predictions."""
    draws: ClassVar[frozenset[Topic]] = frozenset()
    """The parts of the report that charts of what the pass leaves belong to (:mod:`bitlower.ir.charts`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = cls.__dict__.get("run")
        if run is not None and len(inspect.signature(run).parameters) == 2:  # a pass that needs no context
            cls.run = lambda self, program, context: run(self, program)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Hold the parameters to their bounds.

        Raises:
            BitlowerError: one lies outside.
        """
        check_bounds(self, self.name or type(self).__name__)

    def run(self, program: Program, context: Context) -> bool:
        """Edit ``program`` in place and say whether it changed.

        The pipeline hands over a clone and recompiles it afterwards. Raise
        :class:`~bitlower.ir.diagnostics.BitlowerError` for what the user can fix.
        """
        raise BitlowerError(f"{type(self).__name__} defines no `run`", hint="write `def run(self, program, context)`")

    def needs_calibration(self) -> bool:
        """Whether :meth:`run` cannot do without ``context.calibration``.

        A recipe without calibration data is refused before any work, with the place of the pass.
        """
        return False

    def data_runs(self, program: Program) -> int:
        """How often :meth:`run` runs ``program`` over all calibration data, for predictions of time."""
        return 0

    def sets_bits(self) -> bool:
        """Whether :meth:`run` gives tensors quantizers, or quantizers other bits: backends are asked again then."""
        return self.ensures is Level.SIMULATED

    def runs_in_plan(self) -> bool:
        """Whether a prediction of sizes runs the pass: it is quick and needs no data."""
        return self.sets_bits() and not self.needs_calibration()

    def solver_bytes(self, workload: Workload) -> int:
        """What :meth:`run` holds in memory beside the model, for predictions."""
        return 0

    def solver_operations(self, workload: Workload) -> float:
        """The floating-point operations of :meth:`run` beside :meth:`data_runs`, for predictions of time."""
        return 0.0

    def unforeseen(self, program: Program) -> Iterable[str]:
        """Why :meth:`run`, or what follows it, takes more time and memory than is predicted, a line for each reason."""
        return ()

    def rehearsed(self) -> Self:
        """The pass with as few iterations as it can have, for a rehearsal of the recipe; itself if it has none."""
        return self

    def trains(self) -> bool:
        """Whether :meth:`run` trains on data: on ``context.training``, or on the calibration data where it is empty.

        Both empty is found before any work: a recipe without either is refused, with the place of the pass.
        """
        return False

    def training_steps(self, batches: int) -> int:
        """How many batches :meth:`run` trains the whole program on, for predictions of time and memory.

        Args:
            batches: in the data that it trains on: an epoch. Steps that train one block of many are so many steps of
                the whole together: 200 for each block are 200.
        """
        return 0

    def training_evaluations(self, batches: int) -> int:
        """How often :meth:`run` evaluates all held-out data while it trains, for predictions; ``batches`` as above."""
        return 0

    def block_schedule(self) -> BlockSchedule | None:
        """How :meth:`run` trains one block after another, for predictions; None: it does not."""
        return None

    def parameters(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return changed_fields(self)
