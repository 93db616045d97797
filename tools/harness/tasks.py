"""Tasks of lm-evaluation-harness and of MTEB, on an artifact in its runtime or on a float model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bitlower.ir import BitlowerError, nearest
from bitlower.tools.evaluation.evaluate import TOKENS
from bitlower.tools.evaluation.figures import Figure, Figures, exponential, mean, point, ratio
from bitlower.tools.evaluation.language_model import language_model
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Track, open_runner

LM_EVAL, MTEB = "lm-eval", "mteb"
HARNESSES = (LM_EVAL, MTEB)
_NATS = 1 / math.log(2)


@dataclass(frozen=True)
class Request:
    """What to run.

    Args:
        tasks: names of tasks.
        include: of lm-eval a folder with tasks of one's own (YAML); of mteb a Python file with classes of tasks.
        shots: examples in front of each question (lm-eval); None: as the task says.
        limit: the first so many rows of a task (lm-eval); None: all.
        batch_size: of texts.
        max_length: tokens of a text (mteb); longer ones are cut.
        seed: of the resamples of intervals.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TaskResult:
    """What a task measured, in the harness's own units, and the metrics of which less is better."""

    evaluation: Evaluation
    lower: frozenset[str]


def run_harness(
    harness: str, target: str | os.PathLike[str], request: Request, *, track: Track = lambda items, label: iter(items)
) -> dict[str, TaskResult]:
    """Run tasks of ``harness`` on ``target``; what each measured, by its name.

    Args:
        harness: one of :data:`HARNESSES`.
        target: an artifact's folder, or a float model as the frontends take it.
        request: tasks and options.
        track: wraps runs of the model with a progress display.

    Raises:
        BitlowerError: an unknown harness or task, one that is not installed, or a model that does not fit.
        CheckError: the model gives NaN.
    """
    if harness not in HARNESSES:
        raise BitlowerError(f"unknown harness {harness!r}", hint=nearest(harness, HARNESSES))
    if not request.tasks:
        raise BitlowerError(f"there is no task of {harness} to run", hint="name some: --tasks NAME,NAME")
    return (_lm_eval if harness == LM_EVAL else _mteb)(target, request, track)


def _lm_eval(target: str | os.PathLike[str], request: Request, track: Track) -> dict[str, TaskResult]:
    evaluator, manager = _needed(LM_EVAL, "lm_eval.evaluator"), _needed(LM_EVAL, "lm_eval.tasks")
    from bitlower.tools.harness.language_models import HarnessModel, quiet_harness

    quiet_harness()
    tasks = _known_tasks(manager, request)
    model = HarnessModel(language_model(target), batch_size=request.batch_size, track=track)
    try:
        form = evaluator.simple_evaluate(
            model, tasks=list(request.tasks), task_manager=tasks, num_fewshot=request.shots, limit=request.limit,
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    except BitlowerError:
        raise
    except Exception as error:  # whatever tasks and what reads their data raise
        why = " ".join(str(error).split())[:300]
        raise BitlowerError(
            f"{LM_EVAL} cannot run {', '.join(request.tasks)}: {type(error).__name__}: {why}",
            hint="are the task's data on this machine?",
        ) from None
    return {
        name: _of_task(
            os.fspath(target),
            name,
            scores,
            form["samples"].get(name, ()),
            form["higher_is_better"].get(name, {}),
            request.seed,
        )
        for name, scores in form["results"].items()
    }


def _known_tasks(manager: ModuleType, request: Request) -> Any:
    """The harness's tasks; its own are read only if one of them is asked for, since that takes a while.

    Raises:
        BitlowerError: there is no such folder, or no such task.
    """
    include = request.include
    if include is not None and not include.is_dir():
        raise BitlowerError(f"there is no folder {include} of tasks", hint="--include-path is one with YAML files")
    places = {} if include is None else {"include_path": str(include)}
    own = manager.TaskManager(include_defaults=False, **places) if places else None
    if own is not None and set(request.tasks) <= set(own.all_tasks):
        return own
    tasks = manager.TaskManager(**places)
    for name in request.tasks:
        if name not in tasks.all_tasks:
            raise BitlowerError(f"{LM_EVAL} has no task {name!r}", hint=nearest(name, tasks.all_tasks))
    return tasks


def _of_task(
    target: str,
    task: str,
    scores: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    higher: Mapping[str, bool | None],
    seed: int,
) -> TaskResult:
    """A task's figures with intervals, from the score of each row where there is one."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    by_name: dict[str, Figure] = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        rows = [row[metric] for row in samples if metric in row and row.get("filter", "none") == (filtered or "none")]
        if figure := _figure(rows, value):
            by_name[name] = figure
    count = int(scores.get("sample_len", 0)) or len(samples)
    read = "".join(str(row.get("doc_hash", "")) for row in samples)
    hashes = hashlib.sha256(read.encode()).hexdigest()
    figures = Figures(len(samples), "rows", by_name, hashes) if by_name else None
    without = [name for name in metrics if name not in by_name]
    notes = tuple(f"{task}: {name} has no interval, since it is no mean over rows" for name in without)
    lower = frozenset(name for name in metrics if higher.get(name.partition(",")[0]) is False)
    units = dict.fromkeys(metrics, "")
    measured = Evaluation(target, task, LM_EVAL, count, metrics, notes, units, figures)
    return TaskResult(measured.with_intervals(seed=seed), lower)


def _figure(rows: Sequence[Any], value: float) -> Figure | None:
    """What the harness computed from scores of rows, known by its value: a mean, or a perplexity by rows or weights."""
    if not rows:
        return None
    candidates: list[Figure] = []
    scores = np.asarray(rows, np.float64) if all(isinstance(row, int | float | np.number) for row in rows) else None
    if scores is not None:
        candidates = [mean(scores, scale=1.0), exponential(mean(-scores, scale=1.0))]
    elif all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        pairs = np.asarray(rows, np.float64)
        loss = ratio(-pairs[:, 0], pairs[:, 1], scale=1.0)
        candidates = [exponential(loss), ratio(-pairs[:, 0], pairs[:, 1], scale=_NATS)]
    points = (point(each, len(rows)) for each in candidates)
    fits = (math.isclose(each, value, rel_tol=1e-6, abs_tol=1e-12) for each in points)
    return next((each for each, fit in zip(candidates, fits, strict=True) if fit), None)


def _mteb(target: str | os.PathLike[str], request: Request, track: Track) -> dict[str, TaskResult]:
    if request.shots is not None or request.limit is not None:
        raise BitlowerError(f"{MTEB} runs all rows, without examples", hint="leave out --num-fewshot and --limit")
    _needed(MTEB, "mteb")
    from bitlower.tools.harness.embeddings import HarnessEncoder, read_tasks, scores_of

    tasks, length = read_tasks(request.tasks, request.include), request.max_length or TOKENS
    encoder = HarnessEncoder(
        open_runner(target), os.fspath(target), batch_size=request.batch_size, max_length=length, track=track
    )
    results = {}
    for task in tasks:
        name, scores = task.metadata.name, scores_of(task, encoder)
        notes = (f"{name}: {MTEB} gives no scores of rows, so that there are no intervals",)
        measured = Evaluation(os.fspath(target), name, MTEB, 0, scores, notes, dict.fromkeys(scores, ""))
        results[name] = TaskResult(measured, frozenset())
    return results


def _needed(harness: str, module: str) -> Any:
    """A module of a harness.

    Raises:
        BitlowerError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise BitlowerError(
            f"--harness {harness} needs the package {harness}: {error}", hint=f"pip install 'bitlower[{harness}]'"
        ) from None
