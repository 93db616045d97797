"""A failing pass leaves a folder that replays it: the program before it, the data, the one-pass pipeline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.files import read_text
from bitlower.ir.json_files import read_json
from bitlower.ir.serialize import load, save
from bitlower.passes._machinery.base import Context, Pass
from bitlower.passes._machinery.losses import LOSSES
from bitlower.passes._machinery.manager import PassManager
from bitlower.passes._machinery.observers import Observer
from bitlower.passes._machinery.pipeline import format_pipeline, parse_pipeline
from bitlower.passes._machinery.registry import load_plugin, plugin_files, providers
from bitlower.passes._machinery.results import decode_results, encode_results

COMMAND = "python -c \"from bitlower.passes import replay; replay('.')\""


class Reproducer(Observer):
    """When a pass or a check of it fails, write what is needed to see it fail again.

    ``program.json`` and ``program.safetensors``: the program before the pass. ``batches.safetensors``: calibration and
    evaluation batches. ``pipeline.txt``: the pass. ``settings.json``: seed and the results in the context.
    ``plugin/``: the loose files of the pass and its losses, if it has any. ``command.txt``: what to run in the folder.

    Args:
        folder: takes the files; an older reproducer there is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._results: dict[type, Any] = {}

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Remember the results that the pass may read."""
        self._results = dict(context.results)

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        """Write the folder, unless a user stopped the run."""
        if not isinstance(error, Exception):
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".reproducer"))
        try:
            self._write(temporary, pass_, program, context)
            shutil.rmtree(self.folder, ignore_errors=True)
            temporary.replace(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"reproducer: {self.folder} (command.txt replays it)")

    def _write(self, folder: Path, pass_: Pass, program: Program, context: Context) -> None:
        save(program, folder)
        save_file(_flatten(context), folder / "batches.safetensors")
        plugins = plugin_files(pass_)
        copies = {f"{index}/{path.name}": path for index, path in enumerate(plugins)}
        settings = {
            "seed": context.seed,
            "results": encode_results(self._results),
            "plugins": {copy: plugins[path] for copy, path in copies.items()},
        }
        texts = {
            "pipeline.txt": format_pipeline([pass_]),
            "settings.json": json.dumps(settings, indent=1, sort_keys=True),
            "command.txt": COMMAND,
        }
        for name, text in texts.items():
            with (folder / name).open("w") as file:
                file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
        for copy, path in copies.items():
            (folder / "plugin" / copy).parent.mkdir(parents=True)
            shutil.copyfile(path, folder / "plugin" / copy)


def replay(folder: str | Path) -> Program:
    """Run the pass of a reproducer again, and return the program if it does not fail this time.

    Raises:
        BitlowerError: the folder is no reproducer, or is damaged; else what the pass raises.
    """
    folder = Path(folder)
    try:
        settings = read_json(folder / "settings.json", finite=False)
        text = read_text(folder / "pipeline.txt")
        tensors = load_file(folder / "batches.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BitlowerError(f"{folder} is not a reproducer ({error})") from error
    for plugin, names in settings["plugins"].items():
        if not set(names) <= {*providers(), *LOSSES.providers()}:
            load_plugin(folder / "plugin" / plugin)
    passes = parse_pipeline(text)
    context = Context(
        calibration=_unflatten(tensors, "calibration"),
        evaluation=_unflatten(tensors, "evaluation"),
        seed=settings["seed"],
        results=decode_results(settings["results"], type(passes[0]).__module__.partition(".")[0]),
    )
    return PassManager(passes).run(load(folder), context)


def _flatten(context: Context) -> dict[str, torch.Tensor]:
    """All batches as ``calibration/00000/input_ids``."""
    return {
        f"{part}/{index:05}/{name}": tensor.detach().clone().contiguous()
        for part, batches in (("calibration", context.calibration), ("evaluation", context.evaluation))
        for index, batch in enumerate(batches)
        for name, tensor in batch.items()
    }


def _unflatten(tensors: Batch, part: str) -> Sequence[Batch]:
    batches: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        kind, index, name = key.split("/", 2)
        if kind == part:
            batches[index][name] = tensor
    return [batches[index] for index in sorted(batches)]
