"""How one run uses the cache: the key of each pass, what the pass read of the context, what it gave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitlower.ir import BitlowerError, Program
from bitlower.passes._machinery.base import Context, Pass
from bitlower.passes._machinery.cache import Cache, Entry
from bitlower.passes._machinery.digest import digest_batches, digest_code, digest_program
from bitlower.passes._machinery.observers import Recorder
from bitlower.passes._machinery.pipeline import format_pipeline
from bitlower.passes._machinery.registry import classes_of
from bitlower.passes._machinery.results import decode_results, encode_results

_PARTS = frozenset({"calibration", "evaluation", "training", "held_out", "reference", "seed"})


@dataclass
class WatchedContext(Context):
    """A context that notes in ``used`` which data a pass reads, so that its cache key holds those and no others."""

    used: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        if name in _PARTS:
            object.__getattribute__(self, "__dict__").get("used", set()).add(name)
        return super().__getattribute__(name)


class Resume:
    """One run's view of the cache.

    A key is made of the program before the pass, the pass as text, its code, the results in the context, and those of
    data, reference and seed that the pass was seen to read. What it reads can only depend on what it
    has read, so a run that finds all of that unchanged would read and return the same.
    """

    def __init__(self, cache: Cache, context: Context) -> None:
        self.cache = cache
        self._context = context
        self._parts: dict[str, str] = {}
        self._base = ""
        self._key = ""
        self._entry: Entry | None = None
        self._row_keys: dict[Recorder, str] = {}

    def recall(self, pass_: Pass, program: Program, context: Context) -> Entry | None:
        """What the cache knows of ``pass_`` on ``program``; its results are put into the context."""
        self._entry = None
        self._row_keys.clear()
        base = [
            digest_program(program),
            format_pipeline([pass_]),
            *map(digest_code, classes_of(pass_)),
            encode_results(context.results),
        ]
        self._base = hashlib.sha256(json.dumps(base).encode()).hexdigest()
        self._key = self._full_key(self.cache.uses(self._base))
        entry = self.cache.get(self._key, program)
        if entry is None:
            return None
        try:
            context.results.update(decode_results(entry.results, type(pass_).__module__.partition(".")[0]))
        except BitlowerError:
            return None
        self._entry = entry
        return entry

    def remember(self, pass_: Pass, program: Program | None, before: dict[type, Any], context: WatchedContext) -> None:
        """Store what ``pass_`` gave: a new program or None, and results that were not there before.

        Raises:
            BitlowerError: a result that the pass left cannot be saved, or the cache cannot be written to.
        """
        left = {kind: value for kind, value in context.results.items() if before.get(kind) is not value}
        try:
            results = encode_results(left)
        except BitlowerError as error:
            raise BitlowerError(
                f"what the pass {pass_.name!r} left in the context does not go into the cache: {error.message}",
                hint=f"{error.hint or 'use frozen dataclasses of plain data'}, or run without the cache",
            ) from error
        self._key = self._full_key(self.cache.note_uses(self._base, frozenset(context.used)))
        self._entry = Entry(program is not None, program, results)
        self.cache.put(self._key, self._entry)

    def work(self) -> Path:
        """A folder for checkpoints inside the pass at hand: of this program, this pass, these data and this seed."""
        key = self._full_key(_PARTS)
        return self.cache.folder / "work" / key

    def row(self, recorder: Recorder) -> Any:
        """What ``recorder`` recorded about this pass in an earlier run; None if nothing."""
        return self._entry.rows.get(self._row_key(recorder)) if self._entry else None

    def store_rows(self, recorders: Iterable[Recorder]) -> None:
        """Add what the recorders recorded about this pass to its entry."""
        if self._entry is None:
            return
        rows = {self._row_key(recorder): recorder.row() for recorder in recorders}
        rows = {key: row for key, row in rows.items() if row is not None}
        if rows.keys() - self._entry.rows.keys():
            self._entry.rows |= rows
            self.cache.put_rows(self._key, self._entry)

    def _row_key(self, recorder: Recorder) -> str:
        """The recorder's key, asked of it once a pass: it may stand for a program."""
        if recorder not in self._row_keys:
            self._row_keys[recorder] = recorder.key(self._context)
        return self._row_keys[recorder]

    def _full_key(self, uses: frozenset[str]) -> str:
        parts = {name: self._part(name) for name in sorted(uses)}
        return hashlib.sha256(json.dumps([self._base, parts]).encode()).hexdigest()

    def _part(self, name: str) -> str:
        """The digest of one part of the context, computed once; the reference is set on the way."""
        if name == "reference":
            return digest_program(self._context.reference) if self._context.reference else ""
        if name not in self._parts:
            value = getattr(self._context, name)
            self._parts[name] = str(value) if name == "seed" else digest_batches(value)
        return self._parts[name]
