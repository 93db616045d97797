"""Accuracy of int8 all-MiniLM-L6-v2: STS-B dev, and how close the embeddings stay to fp32; ours and the peers'.

    python benchmarks/accuracy.py --data DIR

Calibration: 128 sentences of STS-B train, every 44th, so that all its genres are in it. Float and our artifacts run
through ``bitlower eval``; cosines are those of mean-pooled embeddings with fp32's, over 200 sentences of STS-B dev.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _common import MODEL, data_folder, show_table, write_result
from latency import build_model

import bitlower
from bitlower.frontends.locate import locate
from bitlower.tools.evaluation.evaluate import cosine, evaluate, mean_pool

SCHEMES = ("W8A8", "W8A8-token", "W8A8-full")
PEERS = ("fp32", "dynamic", "static")


def sentences(path: Path, count: int, step: int = 1) -> list[str]:
    """``count`` first sentences of an STS-B file, every ``step``-th row."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[5] for row in rows[::step]][:count]


def embed(model: Path, batches: Sequence[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Mean-pooled embeddings in onnxruntime; the token embeddings are the first output of every side."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    parts = []
    for batch in batches:
        feed = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
        parts.append(mean_pool(session.run(None, feed)[0], feed["attention_mask"]))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with the data sets (STS-B in it); default: $BITLOWER_DATA")
    parser.add_argument("--step", type=int, default=44, help="calibrate on each n-th sentence of the file")
    arguments = parser.parse_args()
    data = data_folder(arguments.data) / "STS-B"
    texts = sentences(data / "sts-train.tsv", 128, arguments.step)
    rows = [row_of("float", evaluate(MODEL, "sts-b", data / "sts-dev.tsv").metrics, 0, None)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = bitlower.load(MODEL)
        probes = bitlower.batches(program, sentences(data / "sts-dev.tsv", 200, 7), batch_size=1)
        from transformers import AutoModel

        calibration = bitlower.batches(program, texts, max_length=64)
        build_model(folder / "peers", AutoModel.from_pretrained(locate(MODEL)), calibration)
        reference = embed(folder / "peers" / "fp32.onnx", probes)
        for scheme in SCHEMES:
            output = folder / scheme
            bitlower.quantize(MODEL, scheme=scheme, calibration=texts, max_length=64, output=output)
            metrics = evaluate(output, "sts-b", data / "sts-dev.tsv").metrics
            rows.append(
                row_of(
                    f"bitlower {scheme}", metrics, size(output), cosine(embed(output / "model.onnx", probes), reference)
                )
            )
        for peer in PEERS[1:]:
            path = folder / "peers" / f"{peer}.onnx"
            rows.append(row_of(f"onnxruntime {peer}", {}, path.stat().st_size, cosine(embed(path, probes), reference)))
    write_result("accuracy", "python benchmarks/accuracy.py --data DIR", {"rows": rows})
    keys = ("side", "spearman", "pearson", "file_mb", "cosine_mean", "cosine_min")
    show_table(keys, [[row[key] for key in keys] for row in rows])


def size(artifact: Path) -> int:
    """Bytes of the model file and its external data."""
    return sum(path.stat().st_size for path in artifact.glob("model.onnx*"))


def row_of(side: str, metrics: dict[str, float], size: int, cosines: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """One line of the table."""
    return {
        "side": side,
        "spearman": round(metrics["spearman"], 2) if metrics else None,
        "pearson": round(metrics["pearson"], 2) if metrics else None,
        "file_mb": round(size / 1e6, 2) if size else None,
        "cosine_mean": round(float(cosines.mean()), 5) if cosines is not None else None,
        "cosine_min": round(float(cosines.min()), 5) if cosines is not None else None,
    }


if __name__ == "__main__":
    main()
