"""The pass manager: runs passes in order on clones, holds them to their contracts, and lets observers watch."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from bitlower.ir import BitlowerError, Program
from bitlower.ir.storage import trim
from bitlower.passes._base import Context, Contract, Pass
from bitlower.passes._cache import Cache, aligned
from bitlower.passes._contracts import Guard, check_levels
from bitlower.passes._observers import Observer, Recorder, Verify
from bitlower.passes._pipeline import format_pipeline
from bitlower.passes._registry import describe_error
from bitlower.passes._resume import Resume, WatchedContext


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
            CheckError: a pass broke its contract or the program.
        """
        check_levels(self.passes, program.level)
        resume = Resume(self.cache, context) if self.cache else None
        if resume:
            program = aligned(program)
        for pass_ in self.passes:
            program = self._step(pass_, program, context, resume)
        return program

    def _step(self, pass_: Pass, program: Program, context: Context, resume: Resume | None) -> Program:
        try:
            for observer in self.observers:
                observer.before(pass_, program, context)
            result, changed = self._outcome(pass_, program, context, resume)
            for observer in self.observers:
                row = resume.row(observer) if resume and isinstance(observer, Recorder) else None
                if row is not None and isinstance(observer, Recorder):
                    observer.restore(row)
                else:
                    observer.after(pass_, result, context, changed)
            if resume:
                resume.store_rows(observer for observer in self.observers if isinstance(observer, Recorder))
            return result
        except BaseException as error:
            error.add_note(f"in the pass {format_pipeline([pass_])}")
            self._tell_failure(pass_, program, context, error)
            raise

    def _outcome(self, pass_: Pass, program: Program, context: Context, resume: Resume | None) -> tuple[Program, bool]:
        """What the pass gives, from the cache if it is there; results in the context are as after the pass."""
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
            for kind, value in before.items():
                if context.results.get(kind) is value and kind not in pass_.preserves:
                    del context.results[kind]
        return result, changed

    def _tell_failure(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        for observer in self.observers:
            try:
                observer.failed(pass_, program, context, error)
            except Exception as second:
                error.add_note(f"and {type(observer).__name__} failed on it: {second}")


def execute(pass_: Pass, program: Program, context: Context) -> tuple[Program, bool]:
    """Run one pass on a clone and hold it to its contract; gives ``program`` itself if the pass changed nothing.

    Raises:
        BitlowerError: the pass refuses its input, or it is a third party's and fails.
        CheckError: the pass broke its contract.
    """
    guard = Guard(pass_, program)
    clone = program.clone()
    try:
        changed: Any = pass_.run(clone, context)
        if not isinstance(changed, bool):
            raise BitlowerError(
                f"the pass {pass_.name!r} returned {type(changed).__name__}",
                hint="`run` returns True if it changed the program, else False",
            )
        if changed:
            clone.level = pass_.ensures or program.level
            clone.passes = [*program.passes, format_pipeline([pass_])]
            clone.recompile()
        exact = pass_.contract is Contract.EXACT and changed
        guard.check(clone, changed, (context.evaluation or context.calibration[:1]) if exact else ())
    except BitlowerError:
        raise
    except Exception as error:
        if type(pass_).__module__.startswith("bitlower."):
            raise
        raise _foreign_error(pass_, error) from error
    trim()
    return (clone, True) if changed else (program, False)


def _foreign_error(pass_: Pass, error: Exception) -> BitlowerError:
    """A third party's failure in one line, with the line of its source."""
    source = None
    with contextlib.suppress(TypeError):
        source = inspect.getsourcefile(type(pass_))
    return BitlowerError(f"pass {pass_.name!r} failed: {describe_error(error, source)}")
