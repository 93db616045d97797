"""The pass manager: runs passes in order on clones, holds them to their contracts, and lets observers watch."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program
from bitlower.ir.plugins.process import kept_process
from bitlower.ir.storage import trim
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.batch_guard import BatchGuard
from bitlower.passes._machinery.cache import Cache, aligned
from bitlower.passes._machinery.contracts import Guard, check_levels
from bitlower.passes._machinery.declared import check_declared, declared
from bitlower.passes._machinery.faults import blame_pass, is_own, pass_name
from bitlower.passes._machinery.observers import Observer, Recorder, Verify
from bitlower.passes._machinery.pipeline import format_pipeline
from bitlower.passes._machinery.report import Record
from bitlower.passes._machinery.resume import Resume, WatchedContext
from bitlower.passes._machinery.shape import shape_problem
from bitlower.passes._machinery.trespass import TrespassGuard


class PassManager:
    """A pipeline that is ready to run.

    Args:
        passes: in order.
        observers: called around every pass, in this order.
        cache: what passes give is stored there, and taken from there by a later run; None for none.
        verify: verify the program after every pass, before the other observers see it.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        observers: Sequence[Observer] = (),
        cache: Cache | None = None,
        *,
        verify: bool = True,
    ) -> None:
        self.passes = tuple(passes)
        needs_verify = verify and not any(isinstance(observer, Verify) for observer in observers)
        self.observers = (*((Verify(),) if needs_verify else ()), *observers)
        self.cache = cache

    def run(self, program: Program, context: Context) -> Program:
        """What the passes make of ``program``, which itself stays as it is.

        Raises:
            BitlowerError: the levels do not go together (found before any work), a pass refuses its input, or a
                third party's pass fails.
            CheckError: a pass broke its contract or the program, wrote into the data, or left something behind in the
                process.
        """
        for pass_ in self.passes:
            check_declared(pass_)
        check_levels(self.passes, program.level)
        _fit(program, context)
        resume = Resume(self.cache, context) if self.cache else None
        if resume:
            program = aligned(program)
        for pass_ in self.passes:
            program = self._step(pass_, program, context, resume)
        return program

    def cached(self, program: Program, context: Context) -> tuple[Pass, ...]:
        """The first passes whose results :meth:`run` would take from the cache; the rest it would compute."""
        if self.cache is None:
            return ()
        _fit(program, context)
        resume, program = Resume(self.cache, context), aligned(program)
        for position, pass_ in enumerate(self.passes):
            _note_reference(pass_, program, context)
            before = dict(context.results)
            entry = resume.recall(pass_, program, context)
            if entry is None:
                return self.passes[:position]
            if entry.changed:
                _void(pass_, context, before)
            program = entry.program or program
        return self.passes

    def _step(self, pass_: Pass, program: Program, context: Context, resume: Resume | None) -> Program:
        try:
            for observer in self.observers:
                observer.before(pass_, program, context)
            _note_reference(pass_, program, context)
            result, changed = self._outcome(pass_, program, context, resume)
            self._observe(pass_, result, context, changed, resume)
            return result
        except BaseException as raised:
            error = raised if isinstance(raised, BitlowerError) else blame_pass(pass_, raised)
            if error is not raised:
                error.__cause__ = raised
            error.add_note(f"in the pass {describe_pass(pass_)}")
            self._tell_failure(pass_, program, context, error)
            if error is raised:
                raise
            raise error from raised

    def _observe(self, pass_: Pass, result: Program, context: Context, changed: bool, resume: Resume | None) -> None:
        """Let the observers look at what the pass gave; those with a record in the cache take that instead."""
        for observer in self.observers:
            row = resume.row(observer) if resume and isinstance(observer, Recorder) else None
            if row is not None and isinstance(observer, Recorder):
                observer.restore(row)
            else:
                observer.after(pass_, result, context, changed)
        if resume:
            resume.store_rows(observer for observer in self.observers if isinstance(observer, Recorder))

    def _outcome(self, pass_: Pass, program: Program, context: Context, resume: Resume | None) -> tuple[Program, bool]:
        """What the pass returns, from the cache if it is there; results in the context are as after the pass."""
        check_levels([pass_], program.level)
        before = dict(context.results)
        entry = resume.recall(pass_, program, context) if resume else None
        if entry is not None:
            result, changed = entry.program or program, entry.changed
        else:
            watched = WatchedContext(**{f.name: getattr(context, f.name) for f in dataclasses.fields(context)})
            work = resume.work() if resume else None
            watched.work = work or context.work
            result, changed = execute(pass_, program, watched)
            if resume:
                resume.remember(pass_, result if changed else None, before, watched)
            if work:
                shutil.rmtree(work, ignore_errors=True)
        if changed:
            _void(pass_, context, before)
        return result, changed

    def _tell_failure(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        for observer in self.observers:
            try:
                observer.failed(pass_, program, context, error)
            except Exception as second:
                error.add_note(f"and {type(observer).__name__} failed on it: {second}")


def describe_pass(pass_: Pass) -> str:
    """The pass as text; its name alone where its parameters cannot be printed."""
    try:
        return format_pipeline([pass_])
    except Exception:
        return pass_name(pass_)


def _note_reference(pass_: Pass, program: Program, context: Context) -> None:
    """The last float program is the reference for what comes after it."""
    if program.level is Level.FLOAT and pass_.ensures is Level.SIMULATED:
        context.reference = program


def _void(pass_: Pass, context: Context, before: Mapping[type[Any], Any]) -> None:
    """Drop the analyses of before ``pass_``, which changed the program; records and what it preserves stay."""
    for kind, value in before.items():
        lasts = isinstance(value, Record) or kind in pass_.preserves
        if context.results.get(kind) is value and not lasts:
            del context.results[kind]


def _fit(program: Program, context: Context) -> None:
    """Bring all batches of ``context`` to the sizes and types that ``program`` runs."""
    for part in ("calibration", "evaluation", "training", "held_out"):
        setattr(context, part, _fitted(program, getattr(context, part)))


def _fitted(program: Program, batches: Sequence[Batch]) -> Sequence[Batch]:
    """``batches`` as the program takes them, so that passes see the sizes and types that run."""
    fitted = [program.fitted(batch) for batch in batches]
    return batches if all(new is old for new, old in zip(fitted, batches, strict=True)) else fitted


def execute(pass_: Pass, program: Program, context: Context) -> tuple[Program, bool]:
    """Run one pass on a clone and hold it to its contract; returns ``program`` itself if the pass changed nothing.

    Raises:
        BitlowerError: the pass refuses its input, or it is a third party's and fails.
        CheckError: the pass broke its contract.
    """
    try:
        clone, changed = _run(pass_, program, context)
    except BaseException as error:
        blame = blame_pass(pass_, error)
        if blame is error:
            raise
        raise blame from error
    trim()
    return (clone, True) if changed else (program, False)


def _run(pass_: Pass, program: Program, context: Context) -> tuple[Program, bool]:
    """What the pass makes of a clone; everything else is as it was, or else the pass is to blame."""
    name, said = pass_.name, declared(pass_)
    guard, batches = Guard(pass_, program), BatchGuard(context)
    trespass = nullcontext() if is_own(pass_) else TrespassGuard(name)
    clone = program.clone()
    clone.config = copy.deepcopy(program.config)
    with kept_process(), trespass:
        changed: Any = pass_.run(clone, context)
    batches.check(name)
    if declared(pass_) != said:
        raise CheckError(f"the pass {name!r} changed what it declares while it ran")
    if not isinstance(changed, bool):
        raise BitlowerError(
            f"the pass {name!r} returned {type(changed).__name__}",
            hint="`run` returns True if it changed the program, else False",
        )
    if changed:
        if problem := shape_problem(clone, program):
            raise CheckError(f"the pass {name!r} broke the program: {problem}")
        clone.level = pass_.ensures or program.level
        clone.passes = [*program.passes, format_pipeline([pass_])]
        clone.recompile()
    exact = pass_.contract is Contract.EXACT and changed
    guard.check(clone, changed, (context.evaluation or context.calibration[:1]) if exact else ())
    return clone, changed
