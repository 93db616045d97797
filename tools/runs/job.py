"""One run from the model to the artifact, whatever asked for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitlower.backends.artifact import add_files, list_files
from bitlower.backends.base import Backend
from bitlower.backends.registry import answering
from bitlower.frontends.tokenize import check_tokenizer, lead_names, random_windows
from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program
from bitlower.ir.batch_sizes import LARGEST_OUTPUTS, with_small_outputs
from bitlower.passes import (
    Cache,
    Context,
    Ledger,
    Observer,
    Pass,
    PassManager,
    PassTime,
    PrintAfterChange,
    Progress,
    Reproducer,
    Timing,
    check_levels,
    format_pipeline,
)
from bitlower.tools.data.batches import Data
from bitlower.tools.data.texts import check_finite
from bitlower.tools.render import Display, format_bytes
from bitlower.tools.report.contents import Stage
from bitlower.tools.report.page import write_run_report
from bitlower.tools.runs.float_share import float_parts
from bitlower.tools.runs.heads import HeadNotes
from bitlower.tools.runs.output import disk_errors, new_folder
from bitlower.tools.runs.reports import TENSORS, Reports, report_text
from bitlower.tools.runs.samples import sample_texts
from bitlower.tools.runs.set_aside import setting_aside
from bitlower.tools.runs.summary import RunSummary, peak_bytes
from bitlower.tools.runs.tensor_statistics import TensorStatistics
from bitlower.tools.verdict.verdict import FILE as VERDICT
from bitlower.tools.verdict.verdict import Facts, Verdict

CUT = f"held-out samples are cut to the tokens whose outputs take {format_bytes(LARGEST_OUTPUTS)}"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/bitlower``, or ``~/.cache/bitlower``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "bitlower"


def traces_in(cache: Path | None) -> Path | None:
    """Where a cache keeps what was traced."""
    return cache / "traces" if cache else None


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Args:
        cache: where passes' results are kept, so that a killed run goes on; None: nowhere.
        overwrite: replace an artifact that is there already.
        verify: check the program between passes.
        print_after_change: print the program after each pass that changed it.
        display: where progress goes.
    """

    cache: Path | None = field(default_factory=default_cache)
    overwrite: bool = False
    verify: bool = True
    print_after_change: bool = False
    display: Display = field(default_factory=lambda: Display(quiet=True))


@dataclass(frozen=True)
class Job:
    """What to run.

    Args:
        load: returns the float program; takes the folder in which traces are kept, if any.
        data: returns the batches for it.
        passes: in order.
        exports: backends; several write into folders of their names.
        recipe: goes into the artifact as ``recipe.yaml``, if it is not empty.
        seed: the root of all randomness.
        report: whether every artifact gets a report.
        advice: what would do better, a line each; it is said first and last.
    """

    load: Callable[[Path | None], Program]
    data: Callable[[Program], Data]
    passes: tuple[Pass, ...]
    exports: tuple[Backend, ...] = ()
    recipe: str = ""
    seed: int = 0
    report: bool = False
    advice: tuple[str, ...] = ()

    def read(self, program: Program) -> Data:
        """The data; held-out batches are cut where their outputs would take too much memory, several times over."""
        data = self.data(program)
        small = [with_small_outputs(program, batch) for batch in data.evaluation]
        if all(part is batch for part, batch in zip(small, data.evaluation, strict=True)):
            return data
        return replace(data, evaluation=small, notes=(*data.notes, CUT))

    def context(self, data: Data) -> Context:
        """What the passes see of ``data``."""
        return Context(
            data.calibration, data.evaluation, seed=self.seed, training=data.training, held_out=data.held_out
        )

    def check(self) -> None:
        """See before any work that levels and backends fit.

        Raises:
            BitlowerError: they do not.
        """
        level = check_levels(self.passes, Level.FLOAT)
        for backend in self.exports:
            with answering(type(backend)):
                backend.check_level(level)
                backend.check_host()
        names = [backend.name for backend in self.exports]
        if len(set(names)) != len(names):
            raise BitlowerError("an export is named twice", hint="each backend writes once")


def run_job(job: Job, output: Path | None, options: RunOptions) -> tuple[Program, RunSummary]:
    """Load, run the passes, and write the artifact if there is an ``output``.

    Raises:
        BitlowerError: bad input; nothing is left behind.
        CheckError: the work failed a check; nothing is left behind.
    """
    if output is None:
        job = replace(job, exports=())
    job.check()
    if output is None:
        with disk_errors(options.cache or Path()):
            return _Run(job, options).run(None)
    with new_folder(output, overwrite=options.overwrite) as folder:
        program, summary = _Run(job, options, output.resolve().name).run(folder)
    return program, replace(summary, output=output)


class _Run:
    """The state of one run: its observers and what the stages took."""

    def __init__(self, job: Job, options: RunOptions, name: str = "") -> None:
        self.job, self.options, self.name = job, options, name
        self.timing = Timing()
        self.reports = Reports(options.display.note)
        self.stages: list[PassTime] = []
        self.notes: tuple[str, ...] = ()
        self.heads = HeadNotes()
        self.tensors: dict[str, Any] = {}

    def run(self, folder: Path | None) -> tuple[Program, RunSummary]:
        """All stages; the artifact goes into ``folder`` if there is one."""
        with setting_aside() as set_aside:
            program, data = self.load()
            set_aside()
            float_bytes = program.size_bytes()
            program, ledger = self.lower(program, data, folder)
            before_export = [*self.stages, *self.timing.rows]
            self.stages.clear()
            set_aside()  # the float program goes
            floats = float_parts(program)
            facts = Facts(program, self.job.passes, float_bytes, ledger, sum(part.share for part in floats))
            reports, verdicts = self.export(facts, data, folder) if folder else ({}, {"": facts.verdict({}, 0)})
        stages = (*before_export, *self.stages)
        if folder and self.job.report:
            self.write_reports(program, data, folder, stages)
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in _files(folder)} if folder else {}
        pipeline = format_pipeline(self.job.passes)
        return program, RunSummary(
            pipeline,
            None,
            stages,
            peak_bytes(),
            float_bytes,
            files,
            ledger,
            reports,
            self.notes,
            floats,
            verdicts,
            self.job.advice,
        )

    def load(self) -> tuple[Program, Data]:
        """The float program and its data."""
        job, display = self.job, self.options.display
        with self.stage("load"):
            self.say(*job.advice)
            display.note("loading and tracing the model")
            with display.expecting("loading and tracing"):
                program = job.load(traces_in(self.options.cache))
            self.say(*program.notes)
        with self.stage("data"):
            data = job.read(program)
            self.say(*data.notes)
            for part in ("calibration", "evaluation", "training", "held_out"):
                check_finite(getattr(data, part), part.replace("_", "-"))
            if data.lead:
                self.say(f"each window begins with {lead_names(program, data.lead)}")
            if data.training:
                self.say(_amount(data))
        return program, data

    def lower(self, program: Program, data: Data, folder: Path | None) -> tuple[Program, dict[str, Any]]:
        """Run the passes, which have no business in ``folder``; the rows of the ledger, whose float program goes."""
        ledger, statistics = Ledger(), TensorStatistics()
        context = self.job.context(data)
        context.track = self.options.display.track
        cache = self.open_cache()
        observers = self.observers(ledger, statistics, cache, folder)
        manager = PassManager(self.job.passes, observers, cache, verify=self.options.verify)
        result = manager.run(program, context)
        self.say(*self.heads.notes)
        self.tensors = statistics.form
        return result, ledger.to_dict()

    def export(self, facts: Facts, data: Data, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Verdict]]:
        """Write the files that all artifacts have, what every backend makes of the program beside them, a verdict."""
        program = facts.program
        texts = {
            "ledger.json": f"{json.dumps(facts.ledger, indent=1, sort_keys=True)}\n",
            "recipe.yaml": self.job.recipe,
            **self.reports.files,
            TENSORS: report_text(self.tensors) if self.tensors else "",
        }
        reports, verdicts = dict[str, dict[str, Any]](), dict[str, Verdict]()
        batches = data.evaluation or data.calibration[:2] or random_windows(program, seed=self.job.seed)
        provenance = {"seed": self.job.seed, **data.provenance()}
        for backend in self.job.exports:
            name = backend.name
            with self.stage(name):
                self.options.display.note(f"writing {name}")
                place = folder if len(self.job.exports) == 1 else folder / name
                place.mkdir(exist_ok=True)
                write_texts(place, texts)
                seconds = backend.node_seconds * len(program.graph.nodes)
                with answering(type(backend)), self.options.display.expecting(f"writing and verifying {name}", seconds):
                    reports[name] = backend.export(program, place, batches, provenance).to_dict()
                check_tokenizer(program, place)
                for table, reason in reports[name].get("float_tables", {}).items():
                    self.say(f"{name} has the rounded values of {table} in float: {reason}")
                self.say(*reports[name].get("notes", ()))
                written = sum((place / name).stat().st_size for name in list_files(place))
                verdicts[name] = facts.verdict(reports[name].get("headline", {}), written)
                add_files(place, {VERDICT: verdicts[name].text()})
        return reports, verdicts

    def write_reports(self, program: Program, data: Data, folder: Path, stages: Sequence[PassTime]) -> None:
        """A report in every artifact, of what its files say, of what the run took, and with the worst texts."""
        known = [Stage(stage.name, stage.seconds, stage.peak_bytes) for stage in stages]
        texts = sample_texts(program, data.evaluation, self.tensors.get("samples", ()))
        several = len(self.job.exports) > 1
        for backend in self.job.exports:
            place = folder / backend.name if several else folder
            write_run_report(place, backend.name if several else self.name, known, texts)

    def say(self, *notes: str) -> None:
        """Show notes, and keep them for the summary."""
        self.notes += notes
        for note in notes:
            self.options.display.note(note)

    def observers(
        self, ledger: Ledger, statistics: TensorStatistics, cache: Cache | None, folder: Path | None
    ) -> list[Observer]:
        """Timing comes first, so that it leaves out the others."""
        observers: list[Observer] = [self.timing, TargetCheck(self.job.exports), self.heads, ledger, self.reports]
        if folder is not None:
            observers += [FolderCheck(folder), statistics]
        display = self.options.display
        if not (display.machine or display.quiet):
            observers.append(Progress(total=len(self.job.passes)))
        if self.options.print_after_change:
            observers.append(PrintAfterChange())
        if cache:
            observers.append(FaultReproducer(cache.folder / "reproducer"))
        return observers

    def open_cache(self) -> Cache | None:
        """The cache, unless its folder cannot be made."""
        folder = self.options.cache
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if folder != default_cache():
                raise BitlowerError(f"the cache {folder} cannot be made: {error.strerror}") from None
            self.options.display.note(f"no cache: {folder} cannot be made ({error.strerror})")
            return None
        return Cache(folder)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is no pass; its memory is the process's peak so far."""
        start = time.perf_counter()
        yield
        self.stages.append(PassTime(name, time.perf_counter() - start, peak_bytes()))


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files below ``folder`` by name; an empty text is none."""
    for name, text in texts.items():
        if text:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def _amount(data: Data) -> str:
    """How much there is to train on, in words."""
    (rows, made), (others, more) = ((sum(map(_rows, part)), len(part)) for part in (data.training, data.held_out))
    labelled = " with labels" if all("labels" in batch for batch in data.training) else ""
    return f"to train on: {rows:,} samples{labelled} in {made:,} batches; held out: {others:,} in {more:,}"


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class FaultReproducer(Reproducer):
    """Leaves a reproducer for faults; input that a pass refuses needs none."""

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        """Write the folder, unless the user can fix the input."""
        if not isinstance(error, BitlowerError) or error.exit_code == 1 or error.__cause__ is not None:
            super().failed(pass_, program, context, error)


class FolderCheck(Observer):
    """Sees that the folder that the artifact will be written to stays there, and empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Look.

        Raises:
            CheckError: the folder is gone, or something lies in it.
        """
        if not self.folder.is_dir():
            raise CheckError(f"the pass {pass_.name!r} removed the output's folder {self.folder}")
        if entry := next(self.folder.iterdir(), None):
            raise CheckError(f"the pass {pass_.name!r} wrote {entry.name} into the output's folder {self.folder}")


class TargetCheck(Observer):
    """Asks the backends, as soon as quantizers are placed or get other bits, whether they can hold what comes out."""

    def __init__(self, exports: Sequence[Backend]) -> None:
        self.exports = exports

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Check the program, if it just got its quantizers, or others.

        Raises:
            BitlowerError: a backend cannot hold a tensor, which is named.
        """
        for backend in self.exports if pass_.sets_bits() else ():
            with answering(type(backend)):
                backend.check_fits(program)
