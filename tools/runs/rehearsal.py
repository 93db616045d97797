"""A rehearsal: the whole recipe on few layers and few data, so that what is wrong with it shows before the hours."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.ir.batch_sizes import small_batch
from bitlower.tools.data.batches import Data
from bitlower.tools.recipes.recipe import Recipe
from bitlower.tools.runs.flow import recipe_job
from bitlower.tools.runs.job import RunOptions, run_job, traces_in

BATCHES, ROWS, LENGTH = 2, 4, 32
"""Of each part of the data, so many batches of so many rows of so many tokens are run."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configurations call the number of layers."""
_NUMBER = re.compile(r"(?<=[.])\d+(?=[.]|\\[.]|\[[.]\]|$)")
"""A layer's number in a module path, or in a pattern of paths."""


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal that went to its end.

    Args:
        layers: how much of the model it was, in words.
        seconds: that it took.
        stages: what took how many of them.
        files: of the artifacts that were written, verified, and thrown away.
    """

    layers: str
    seconds: float
    stages: dict[str, float]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        form = {"rehearsed": True, "layers": self.layers, "seconds": round(self.seconds, 3)}
        stages = {name: round(seconds, 3) for name, seconds in self.stages.items()}
        return form | {"stages": stages, "files": list(self.files)}

    def text(self) -> str:
        """One line; its figures would mean nothing, and are not shown."""
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        return f"the recipe runs to its end: rehearsed on {self.layers} in {self.seconds:.0f} s ({stages})"


def rehearse(recipe: Recipe, options: RunOptions | None = None) -> Rehearsal:
    """Run all of ``recipe`` on the first layers of each kind, two batches of each part of the data, and two steps.

    Patterns that name a layer by a number that the few have not name the last of them instead. What comes out is
    verified as always, in a folder that goes at the end; no pass is taken from a cache.

    Raises:
        BitlowerError, CheckError: as the run itself would, but for what more layers or data alone show.
    """
    start, options = time.perf_counter(), options or RunOptions()
    recipe_job(recipe)  # its data are read and its passes are made as they are, so that messages name what is written
    options.display.note("rehearsal: the first layers of each kind")
    program = load(recipe.model_source, task=recipe.model.task, few_layers=True, traces=traces_in(options.cache))
    whole = recipe_job(with_layers(recipe, layer_count(program)))
    job = replace(
        whole,
        load=lambda traces: program,
        data=lambda loaded: few(loaded, whole.data(loaded)),
        passes=tuple(pass_.rehearsed() for pass_ in whole.passes),
    )
    with tempfile.TemporaryDirectory(prefix="bitlower-rehearsal-") as folder:
        summary = run_job(job, Path(folder) / "artifact", replace(options, cache=None))[1]
    layers = next((note for note in program.notes if note.endswith(" layers")), "the whole model")
    stages = {stage.name: stage.seconds for stage in summary.stages}
    return Rehearsal(layers, time.perf_counter() - start, stages, tuple(summary.files))


def layer_count(program: Program) -> int | None:
    """How many layers the configuration of ``program`` says; None if it does not."""
    return next((program.config[key] for key in _COUNTS if isinstance(program.config.get(key), int)), None)


def with_layers(recipe: Recipe, count: int | None) -> Recipe:
    """``recipe`` for a model of ``count`` layers: larger numbers of layers in patterns become the last one's."""
    if count is None:
        return recipe
    passes = [step.model_copy(update={"params": _renumbered(step.params, count)}) for step in recipe.passes]
    changed = recipe.model_copy(update={"passes": passes})
    changed._source = recipe._source
    return changed


def _renumbered(form: Any, count: int) -> Any:
    if isinstance(form, str):
        return _NUMBER.sub(lambda match: str(min(int(match[0]), count - 1)), form)
    if isinstance(form, Mapping):
        return {key: _renumbered(value, count) for key, value in form.items()}
    if isinstance(form, list | tuple):
        return [_renumbered(value, count) for value in form]
    return form


def few(program: Program, data: Data) -> Data:
    """The first rows of the first batches of each part, cut to few tokens."""
    return replace(
        data,
        calibration=_few(program, data.calibration),
        evaluation=_few(program, data.evaluation),
        training=_few(program, data.training),
        held_out=_few(program, data.held_out),
    )


def _few(program: Program, batches: Sequence[Batch]) -> list[Batch]:
    names = {spec.name for spec in program.inputs}
    small = list[Batch]()
    for batch in batches[:BATCHES]:
        inputs = {name: tensor for name, tensor in batch.items() if name in names}
        labels = {name: tensor for name, tensor in batch.items() if name not in names}
        cut = {name: tensor[:ROWS, :LENGTH] if tensor.dim() > 1 else tensor[:ROWS] for name, tensor in labels.items()}
        small.append({**small_batch(program, inputs, ROWS, LENGTH), **cut})
    return small
