"""Latency of int8 encoders in onnxruntime: ours, onnxruntime's own quantizers, and fp32; sides interleaved.

    python benchmarks/latency.py --data DIR

Sides: the fp32 model as torch exports it; our artifact in both forms; ``quantize_dynamic`` per channel;
``quantize_static`` over the same scope (MatMul, Gemm, embedding tables) and the same calibration data. Each side also
runs with onnxruntime's SkipLayerNormalization and BiasGelu fusions turned off, which are slow on the CPU: that helps
everyone. Measured in a process of its own without torch, per point at least 30 runs of each side in turn; the figures
are 10th percentile and median, and the ratios are taken within the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import MODEL, RESULTS, data_folder, show_table, write_result

POINTS = ((1, 128), (8, 128))
NO_FUSION = "SkipLayerNormFusion;BiasGeluFusion"
SIDES = ("fp32", "dynamic", "static", "bitlower qdq", "bitlower onnxruntime")
PEERS = ("dynamic", "static")
SPINNING = {"off": {"session.intra_op.allow_spinning": "0"}, "stop": {"session.force_spinning_stop": "1"}}


def build(folder: Path, data: Path) -> None:
    """Write all models of both sizes below ``folder``."""
    import torch
    from transformers import AutoModel, BertConfig, BertModel

    from bitlower.frontends import batches, load
    from bitlower.frontends.locate import locate

    with open(data / "STS-B" / "sts-train.tsv", encoding="utf-8") as file:
        texts = [row[5] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][::44][:128]
    torch.manual_seed(0)
    minilm = load(MODEL)
    sentences = batches(minilm, texts, max_length=64)
    tokens = [_random_batch(seed) for seed in range(8)]
    build_model(folder / "minilm", AutoModel.from_pretrained(locate(MODEL)), sentences)
    build_model(folder / "bert-base", BertModel(BertConfig()), tokens)


def _random_batch(seed: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(1000, 30000, (2, 64), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def build_model(folder: Path, model: Any, calibration: list[dict[str, Any]]) -> None:
    """fp32, the peers, and ours."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    import bitlower
    from bitlower.backends.onnx_qdq import export

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{k: v.numpy() for k, v in batch.items()} for batch in calibration])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    folder.mkdir(parents=True)
    fp32 = folder / "fp32.onnx"
    export_float(model, calibration[0], fp32)
    kinds = ["MatMul", "Gemm", "Gather"]
    quantize_dynamic(fp32, folder / "dynamic.onnx", kinds, per_channel=True, weight_type=QuantType.QInt8)
    quantize_static(
        fp32, folder / "static.onnx", Reader(), op_types_to_quantize=kinds, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip
    lowered = bitlower.quantize(model.eval(), scheme="W8A8", calibration=calibration)
    for form in ("qdq", "onnxruntime"):
        (folder / form).mkdir()
        export(lowered.program, folder / form, batches=calibration[:1], form=form)
        (folder / form / "model.onnx").rename(folder / f"bitlower {form}.onnx")


def export_float(model: Any, batch: dict[str, Any], path: Path) -> None:
    """The model as torch exports it, opset 21, dynamic batch and sequence."""
    import torch
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(batch, dims)
    program = DynamoExporter().export(model.eval(), dict(batch), config=DynamoConfig(dynamic_shapes=shapes)).program
    torch.onnx.export(program, (), str(path), dynamo=True, opset_version=21, external_data=False, verbose=False)


def measure(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Time every side at every point; a row each."""
    rows = []
    for spinning, entries in SPINNING.items():
        for model in ("minilm", "bert-base"):
            sessions = open_sessions(folder / model, entries)
            for batch, length in POINTS:
                times = time_sides(sessions, batch, length, runs)
                rows += summarize(times, {"model": model, "batch": batch, "tokens": length, "spinning": spinning})
    return rows


def open_sessions(folder: Path, entries: dict[str, str]) -> dict[str, Any]:
    """Every side as it is, and without the two fusions; two threads each."""
    import onnxruntime

    sessions = {}
    for side in SIDES:
        for suffix, extra in (("", {}), (", fusions off", {"optimization.disable_specified_optimizers": NO_FUSION})):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 2
            options.log_severity_level = 3
            for key, value in (entries | extra).items():
                options.add_session_config_entry(key, value)
            path = str(folder / f"{side}.onnx")
            sessions[side + suffix] = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    return sessions


def time_sides(sessions: dict[str, Any], batch: int, length: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds a run; the sides take turns, in alternating order."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    times: dict[str, list[float]] = {side: [] for side in sessions}
    for turn in range(-3, runs):
        for side in list(sessions)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sessions[side].run(None, feed)
            if turn >= 0:
                times[side].append(1000 * (time.perf_counter() - start))
    return times


def summarize(times: dict[str, list[float]], point: dict[str, Any]) -> list[dict[str, Any]]:
    """10th percentile, median, and how many times faster than fp32 and than the faster peer that is."""
    p10, median = ({side: float(np.percentile(t, q)) for side, t in times.items()} for q in (10, 50))
    return [
        point
        | {"side": side, "p10_ms": round(p10[side], 2), "median_ms": round(median[side], 2)}
        | {"x_fp32_p10": round(p10["fp32"] / p10[side], 2), "x_fp32_median": round(median["fp32"] / median[side], 2)}
        | {"x_peer_p10": round(min(p10[peer] for peer in PEERS) / p10[side], 2)}
        | {"x_peer_median": round(min(median[peer] for peer in PEERS) / median[side], 2)}
        for side in times
    ]


def show_summary() -> None:
    """The last results in short: ours against fp32, the faster peer, and the faster peer with its fusions off."""
    rows = json.loads((RESULTS / "latency.json").read_text())["rows"]
    table = []
    for key in dict.fromkeys((r["spinning"], r["model"], r["batch"]) for r in rows):
        p10 = {r["side"]: r["p10_ms"] for r in rows if (r["spinning"], r["model"], r["batch"]) == key}
        best, tuned = (min(p10[f"{peer}{suffix}"] for peer in PEERS) for suffix in ("", ", fusions off"))
        for side in SIDES[3:]:
            ratios = (round(other / p10[side], 2) for other in (p10["fp32"], best, tuned))
            table.append((*key, side, p10[side], *ratios))
    show_table(("spinning", "model", "batch", "side", "p10_ms", "x_fp32", "x_peer", "x_peer_fusions_off"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with the data sets (STS-B in it); default: $BITLOWER_DATA")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--show", action="store_true", help="print the last results in short and measure nothing")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show:
        show_summary()
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.runs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), data_folder(arguments.data))
        command = [sys.executable, __file__, "--measure", folder, "--runs", str(arguments.runs)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(output.splitlines()[-1])
    write_result("latency", "python benchmarks/latency.py --data DIR", {"runs": arguments.runs, "rows": rows})
    keys = ("model", "batch", "tokens", "spinning", "side", "p10_ms", "median_ms", "x_fp32_p10", "x_fp32_median")
    keys += ("x_peer_p10", "x_peer_median")
    show_table(keys, [[row[key] for key in keys] for row in rows])


if __name__ == "__main__":
    main()
