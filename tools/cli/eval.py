"""The command ``eval``: accuracy on labelled data, perplexity and samples of language models; one model or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitlower.tools.cli.conditions import FailIf, finish
from bitlower.tools.cli.eval_options import (
    BatchSize,
    Beams,
    Bos,
    Columns,
    Compare,
    Data,
    Harness,
    IncludePath,
    Joiner,
    Limit,
    MaxLength,
    NewTokens,
    Prompt,
    Seed,
    Shots,
    Stride,
    Target,
    Task,
    Tasks,
    Window,
    Windows,
)
from bitlower.tools.cli.settings import settings_of

if TYPE_CHECKING:
    from rich.table import Table

    from bitlower.tools.evaluation.compare import Difference
    from bitlower.tools.evaluation.generation import Sample
    from bitlower.tools.evaluation.perplexity import TextEvaluation
    from bitlower.tools.evaluation.results import Evaluation
    from bitlower.tools.harness.tasks import Request
    from bitlower.tools.render import Cell, Display
    from bitlower.tools.verdict.conditions import Condition

GENERATION = "text-generation"


def evaluate(
    context: typer.Context,
    target: Target,
    task: Task = None,
    data: Data = None,
    compare: Compare = None,
    columns: Columns = "",
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    seed: Seed = 0,
    joiner: Joiner = None,
    window: Window = 512,
    stride: Stride = None,
    windows: Windows = None,
    prompt: Prompt = None,
    new_tokens: NewTokens = 64,
    bos: Bos = "auto",
    beams: Beams = 1,
    harness: Harness = None,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    num_fewshot: Shots = None,
    limit: Limit = None,
    fail_if: FailIf = None,
) -> None:
    """Measure accuracy on labelled data, or perplexity, samples and speed of a language model, with intervals."""
    from bitlower.frontends.tokenize import check_same_texts
    from bitlower.tools.evaluation.evaluate import evaluate as measure
    from bitlower.tools.evaluation.masked import FILL_MASK
    from bitlower.tools.evaluation.perplexity import evaluate_text
    from bitlower.tools.verdict.conditions import parse_conditions

    display, conditions = settings_of(context).display(), parse_conditions(fail_if)
    targets = [target] if compare is None else [target, compare]
    if harness is not None:
        from bitlower.tools.harness.tasks import Request

        _run_harness(display, conditions, harness, targets, Request(
            _names(tasks), include_path, num_fewshot, limit, batch_size, max_length, seed
        ))  # fmt: skip
        return
    measured, place = _measurable(task, data, beams=beams, compared=compare is not None)
    if compare is not None and measured in (GENERATION, FILL_MASK):
        check_same_texts(target, compare)
    if measured == GENERATION:
        unescaped = None if joiner is None else joiner.replace(r"\n", "\n").replace(r"\t", "\t")
        of_text = partial(
            evaluate_text, data=data, joiner=unescaped, window=window, stride=stride, windows=windows,
            prompts=prompt or (), new_tokens=new_tokens, bos=bos, seed=seed, track=display.track,
        )  # fmt: skip
        _show_texts(display, conditions, [of_text(name) for name in targets], seed)
        return
    of_rows = partial(
        measure, task=measured, data=place, columns=_names(columns), batch_size=batch_size, max_length=max_length,
        seed=seed, beams=beams, track=display.track,
    )  # fmt: skip
    _show_rows(display, conditions, [of_rows(name) for name in targets], seed)


def _measurable(task: str | None, data: str | None, *, beams: int, compared: bool) -> tuple[str, str]:
    """The task, and what it measures on: nothing, where a language model only continues prompts.

    Raises:
        BitlowerError: one is missing, or an option is for other tasks.
    """
    from bitlower.ir import BitlowerError

    if task is None:
        raise BitlowerError("there is no task to measure", hint="give --task, or --harness with --tasks")
    if task == GENERATION and beams != 1:
        raise BitlowerError("text-generation continues prompts greedily", hint="leave out --beams")
    if data is None and task != GENERATION:
        raise BitlowerError("there is nothing to evaluate on", hint="give --data")
    if data is None and compared:
        raise BitlowerError("there is no figure to compare", hint="give --data; samples alone are not compared")
    return task, data or ""


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",")) if listed else ()


def _run_harness(
    display: Display, conditions: Sequence[Condition], harness: str, targets: Sequence[str], request: Request
) -> None:
    """Run tasks of a harness on one model or two, and show what they measure."""
    from bitlower.tools.evaluation.compare import compare
    from bitlower.tools.harness.tasks import run_harness
    from bitlower.tools.render import make_table

    results = [run_harness(harness, target, request, track=display.track) for target in targets]
    first, figures = results[0], dict[str, float]()
    tables: list[Table | str] = []
    form: dict[str, Any] = {"target": targets[0], "harness": harness, "tasks": {}}
    for name, result in first.items():
        measured = result.evaluation
        for note in dict.fromkeys((*measured.notes, *measured.cautions)):
            display.note(note)
        form["tasks"][name] = measured.to_dict()
        figures |= {f"{name}.{key}": value for key, value in measured.metrics.items()}
        title = f"{targets[0]}, {harness}"
        if len(results) == 1:
            rows = [(key, value, _interval(measured.intervals, key, 4)) for key, value in measured.metrics.items()]
            tables.append(make_table(title, (name, "", "95 % interval"), rows))
            continue
        other = results[1][name].evaluation
        pairs = compare(measured, other, seed=request.seed, lower=result.lower)
        form["tasks"][name] |= _compared(other.to_dict(), pairs)
        figures |= _differences(pairs, f"{name}.")
        tables.append(_comparison(f"{title}, against {targets[1]}", name, pairs, measured.units, 4))
    finish(display, form, tables, conditions, figures)


def _differences(pairs: Mapping[str, Difference], prefix: str = "") -> dict[str, float]:
    """The differences of a comparison as figures for conditions: first minus second."""
    return {f"difference.{prefix}{name}": pair.difference for name, pair in pairs.items()}


def _show_rows(display: Display, conditions: Sequence[Condition], results: Sequence[Evaluation], seed: int) -> None:
    """Show what was measured on the rows of a file, of one model or of two."""
    from bitlower.tools.evaluation.compare import compare
    from bitlower.tools.render import make_table

    first = results[0]
    for note in dict.fromkeys(note for result in results for note in (*result.notes, *result.cautions)):
        display.note(note)
    units = {name: first.units.get(name, "%") for name in first.metrics}
    title = f"{first.target} on {first.samples} rows of {first.data}"
    if len(results) == 1:
        rows = [
            (name, round(value, 2), _interval(first.intervals, name), units[name])
            for name, value in first.metrics.items()
        ]
        table = make_table(title, (first.task, "", "95 % interval", "unit"), rows)
        finish(display, first.to_dict(), [table], conditions, first.metrics)
        return
    pairs = compare(*results, seed=seed)
    form = first.to_dict() | _compared(results[1].to_dict(), pairs)
    table = _comparison(f"{title}, against {results[1].target}", first.task, pairs, units)
    finish(display, form, [table], conditions, first.metrics | _differences(pairs))


def _show_texts(
    display: Display, conditions: Sequence[Condition], results: Sequence[TextEvaluation], seed: int
) -> None:
    """Show perplexity and samples, of one language model or of two."""
    from bitlower.tools.evaluation.compare import compare
    from bitlower.tools.render import make_table

    first, form = results[0], results[0].to_dict()
    tables: list[Table | str] = []
    figures = {} if first.perplexity is None else {"perplexity": first.perplexity.perplexity}
    for note in dict.fromkeys(note for result in results for note in result.cautions):
        display.note(note)
    for result in results:
        if result.perplexity is not None:
            title = f"{result.target} on {Path(result.data or '').name}, in {result.runtime}"
            tables.append(make_table(title, ("", ""), _text_rows(result)))
    if len(results) == 2:
        pairs = compare(*results, seed=seed)
        form |= _compared(results[1].to_dict(), pairs)
        figures |= _differences(pairs)
        title = f"{first.target} against {results[1].target}"
        tables.append(_comparison(title, GENERATION, pairs, {"perplexity": ""}))
    for result in results:
        tables += [
            make_table(f"sample of {result.target} in {result.runtime}", ("", ""), _sample_rows(sample))
            for sample in result.samples
        ]
    finish(display, form, tables, conditions, figures)


def _compared(other: Mapping[str, Any], pairs: Mapping[str, Difference]) -> dict[str, Any]:
    """What a comparison adds to the result of the first model, for JSON."""
    return {"compare": other, "differences": {name: pair.to_dict() for name, pair in pairs.items()}}


def _comparison(
    title: str, task: str, pairs: Mapping[str, Difference], units: Mapping[str, str], digits: int = 2
) -> Table:
    """Both figures of each pair, and the difference; numbers have so many digits behind the point."""
    from bitlower.tools.render import make_table

    rows: list[tuple[Cell, ...]] = []
    for name, pair in pairs.items():
        interval = "" if pair.interval is None else _ends(pair.interval, digits)
        first, second = round(pair.first, digits), round(pair.second, digits)
        difference = f"{round(pair.difference, digits) + 0.0:+.{digits}f}"  # no negative zero
        rows.append((name, first, second, difference, interval, pair.verdict, units[name]))
    columns = (task, "first", "second", "difference", "95 % interval, paired", "first is", "unit")
    return make_table(title, columns, rows)


def _interval(intervals: Mapping[str, tuple[float, float]], name: str, digits: int = 2) -> str:
    return _ends(intervals[name], digits) if name in intervals else ""


def _ends(interval: tuple[float, float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _text_rows(result: TextEvaluation) -> list[tuple[str, str]]:
    """A perplexity and all that its value depends on."""
    measured = result.perplexity
    if measured is None:
        return []
    variant = f"{measured.windows} windows of {measured.window} tokens, stride {measured.stride}"
    return [
        ("perplexity", f"{measured.perplexity:.2f}"),
        ("95 % interval", _interval(result.intervals, "perplexity")),
        ("variant", f"{variant}, {measured.tokens_scored} tokens scored of {measured.tokens}"),
        ("windows begin with", f"{result.begins or 'nothing'} (bos: {result.bos})"),
        ("lines", "as they are" if result.joiner is None else f"joined by {result.joiner!r}"),
    ]


def _sample_rows(sample: Sample) -> list[tuple[str, str]]:
    decode = sample.decode_tokens_per_second
    return [
        ("prompt", sample.prompt),
        ("continuation", sample.text),
        ("prompt, tokens a second", f"{sample.prefill_tokens_per_second:.1f} ({sample.prompt_tokens} tokens)"),
        ("then, tokens a second", f"{decode:.1f} ({sample.new_tokens} tokens)" if decode else "one token only"),
    ]
