"""A model of embeddings for MTEB, whatever runs it.

A text's embedding is the mean of its tokens', or the first token's where the model's ``modules.json`` says so; a
similarity is a cosine. Prompts of tasks are not put in front of texts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from bitlower.frontends import batches
from bitlower.ir import BitlowerError, nearest
from bitlower.ir.assets import MODULES
from bitlower.ir.json_files import parse_json
from bitlower.tools.evaluation.evaluate import mean_pool
from bitlower.tools.evaluation.runners import Array, Runner, Track

_TOKENS = "last_hidden_state"
_WITHOUT_EFFECT = ("Transformer", "Pooling", "Normalize")
"""Modules that change no cosine, but for how :func:`pooling` reads the second."""


class HarnessEncoder(AbsEncoder):  # type: ignore[misc]  # mteb is read without its types
    """A model of embeddings as MTEB asks for it.

    Args:
        runner: what runs.
        name: of the model, in results.
        batch_size: texts in a batch.
        max_length: tokens; longer texts are cut.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: the model gives no embeddings of tokens, or pools them as nothing here does.
    """

    def __init__(self, runner: Runner, name: str, *, batch_size: int, max_length: int, track: Track) -> None:
        outputs = [spec.name for spec in runner.program.outputs]
        if outputs[0] != _TOKENS:
            raise BitlowerError(
                f"mteb needs token embeddings, the model gives {outputs[0]!r}", hint="is the task right?"
            )
        self.runner, self.size, self.longest, self._track = runner, batch_size, max_length, track
        self.pooling = pooling(runner.program.assets)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"bitlower/{Path(name).name.replace(':', '-')}",
                "revision": "local",
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> Array:
        """The embeddings of all texts, ``[texts, d]`` float32, in their order."""
        texts = [text for batch in inputs for text in batch["text"]]
        order = np.argsort([len(text) for text in texts], kind="stable")
        made = batches(self.runner.program, [texts[i] for i in order], max_length=self.longest, batch_size=self.size)
        parts = []
        for batch in self._track(made, "embeddings"):
            hidden = self.runner.run(batch)[_TOKENS]
            parts.append(hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, batch["attention_mask"].numpy()))
        rows = np.concatenate(parts).astype(np.float32)
        result = np.empty_like(rows)
        result[order] = rows
        return result


def pooling(assets: Mapping[str, bytes]) -> str:
    """How the files beside a model say that its tokens become an embedding: ``mean``, also where none say, or ``cls``.

    Raises:
        BitlowerError: another way, or modules behind it that change embeddings.
    """
    modules = parse_json(assets[MODULES]) if MODULES in assets else []
    way = "mean"
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _WITHOUT_EFFECT:
            raise BitlowerError(f"the embeddings go through a module {kind!r}, which mteb is not run with")
        if kind == "Pooling":
            way = _way(parse_json(assets.get(f"{module['path']}/config.json", b"{}")))
    return way


def _way(form: Mapping[str, Any]) -> str:
    """Of the configuration of a module, which has flags or, of late, a name."""
    prefix = "pooling_mode_"
    ways = [key.removeprefix(prefix) for key, chosen in form.items() if key.startswith(prefix) and chosen is True]
    ways += [str(form["pooling_mode"])] if isinstance(form.get("pooling_mode"), str) else []
    names = {"mean_tokens": "mean", "cls_token": "cls"}
    chosen = [names.get(way, way) for way in ways] or ["mean"]
    if len(chosen) > 1 or chosen[0] not in ("mean", "cls"):
        raise BitlowerError(f"the tokens are pooled by {' and '.join(chosen)}; mean and cls can be run")
    return chosen[0]


def read_tasks(names: Iterable[str], include: Path | None) -> list[Any]:
    """The tasks of MTEB's own, or of the classes in the Python file ``include``, by name.

    Raises:
        BitlowerError: there is no such file, or no such task.
    """
    own = {} if include is None else _classes(include)
    known = {**{cls.metadata.name: cls for cls in mteb.get_tasks()}} if set(names) - own.keys() else {}
    tasks = []
    for name in names:
        if name not in own and name not in known:
            raise BitlowerError(f"mteb has no task {name!r}", hint=nearest(name, [*own, *known]))
        tasks.append(own[name]() if name in own else known[name])
    return tasks


def _classes(path: Path) -> dict[str, type]:
    """The classes of tasks that a Python file defines, by their names in MTEB; the file is run."""
    if not path.is_file():
        raise BitlowerError(f"there is no file {path} of tasks", hint="for mteb --include-path takes a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BitlowerError(f"{path} is no Python file", hint="for mteb --include-path takes a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a file of the user's raises
        raise BitlowerError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    classes = [value for value in vars(module).values() if isinstance(value, type) and hasattr(value, "metadata")]
    return {cls.metadata.name: cls for cls in classes if cls.__module__ == module.__name__}


def scores_of(task: Any, encoder: HarnessEncoder) -> dict[str, float]:
    """What a task measures, by split and subset where there are several.

    Raises:
        BitlowerError: the task fails; what it raised is said.
    """
    try:
        [result] = mteb.evaluate(encoder, [task], cache=None, show_progress_bar=False, co2_tracker=False).task_results
    except BitlowerError:
        raise
    except Exception as error:  # whatever tasks and what reads their data raise
        why = " ".join(str(error).split())[:300]
        raise BitlowerError(
            f"mteb cannot run {task.metadata.name}: {type(error).__name__}: {why}",
            hint="are the task's data on this machine?",
        ) from None
    rows = [(split, subset) for split, subsets in result.scores.items() for subset in subsets]
    alone, scores = len(rows) == 1, dict[str, float]()
    for split, subset in rows:
        place = "" if alone else f"{split}/{subset['hf_subset']}: "
        scores |= {f"{place}{name}": float(value) for name, value in subset.items() if isinstance(value, int | float)}
    return scores
