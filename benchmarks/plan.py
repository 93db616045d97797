"""How well ``bitlower plan`` foresees the artefact's size and the peak memory of a run.

    python benchmarks/plan.py

For each model and scheme: the plan, then the run in a fresh process, whose peak resident memory the kernel reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import MODEL, show_table, write_result

TEXTS = Path(__file__).parents[1] / "examples" / "sentences.txt"
SCHEMES = ("W8A8", "W8A8-token", "W8A8-full")
BASE = """
import sys, torch
from pathlib import Path
from transformers import BertConfig, BertModel
from bitlower.frontends.locate import locate
torch.manual_seed(0)
BertModel(BertConfig()).save_pretrained(sys.argv[1])
for name in ("tokenizer.json", "tokenizer_config.json"):
    (Path(sys.argv[1]) / name).write_bytes((locate(sys.argv[2]) / name).read_bytes())
"""


def measure(model: str, scheme: str, folder: Path) -> dict[str, object]:
    """Predicted and actual size and peak memory of one run."""
    tool = [sys.executable, "-m", "bitlower.tools.cli", "--json"]
    planned = subprocess.run([*tool, "plan", model, "--scheme", scheme], check=True, capture_output=True, text=True)
    plan = json.loads(planned.stdout)
    output = folder / scheme
    command = [*tool, "quantize", model, "--scheme", scheme, "--calibration", str(TEXTS), "-o", str(output)]
    process = subprocess.Popen([*command, "--no-cache"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{model} {scheme}: the run failed")
    size = sum(path.stat().st_size for path in output.glob("model.onnx*"))
    peak = usage.ru_maxrss * 1024
    return {
        "model": Path(model).name,
        "scheme": scheme,
        "file_bytes": size,
        "file_error_percent": round(100 * (plan["file_bytes"] / size - 1), 2),
        "peak_bytes": peak,
        "peak_error_percent": round(100 * (plan["peak_bytes"] / peak - 1), 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = folder / "bert-base-sized"
        subprocess.run([sys.executable, "-c", BASE, str(base), MODEL], check=True, capture_output=True)
        rows = [measure(MODEL, scheme, folder) for scheme in SCHEMES]
        (folder / "base").mkdir()
        rows.append(measure(str(base), "W8A8", folder / "base"))
    write_result("plan", "python benchmarks/plan.py", {"rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
