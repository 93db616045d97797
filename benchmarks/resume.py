"""Kill a run at random moments and start it again: the artefact must be that of an undisturbed run, to the byte.

    python benchmarks/resume.py

A run with an empty cache gives the reference; a second undisturbed run, with another empty cache, must give the same
bytes. Then a third run is killed with SIGKILL three times, at random moments within the time the first one took, and
started again with the same command until it ends.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import write_result

RECIPE = Path(__file__).parents[1] / "examples" / "minilm-w8a8.yaml"


def run(output: Path, cache: Path, kill_after: float | None = None) -> float:
    """Run the recipe, or kill it on the way; seconds it took."""
    command = [sys.executable, "-m", "bitlower.tools.cli", "--quiet", "run", str(RECIPE), "-o", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--cache", str(cache)], stdout=subprocess.DEVNULL)
    try:
        code = process.wait(kill_after)
        if code:
            raise SystemExit(f"the run ended with {code}")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.perf_counter() - start


def digests(folder: Path) -> dict[str, str]:
    """Every file of an artefact and its hash."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills")
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = run(folder / "first", folder / "cache1")
        run(folder / "second", folder / "cache2")
        reference = digests(folder / "first")
        moments = sorted(random.Random(seed).uniform(0.05, 0.95) * seconds for _ in range(3))
        for moment in moments:
            run(folder / "killed", folder / "cache3", moment)
            if (folder / "killed").exists():
                raise SystemExit("a killed run left an artefact before it was done, or was not killed")
        last = run(folder / "killed", folder / "cache3")
        left = sorted(path.name for path in folder.iterdir() if path.name not in ("first", "second", "killed"))
        result = {
            "undisturbed_seconds": round(seconds, 1),
            "killed_after_seconds": [round(moment, 1) for moment in moments],
            "last_run_seconds": round(last, 1),
            "two_runs_identical": digests(folder / "second") == reference,
            "killed_run_identical": digests(folder / "killed") == reference,
            "left_behind": [name for name in left if not name.startswith("cache")],
            "files": reference,
        }
    write_result("resume", "python benchmarks/resume.py", result)
    print({key: value for key, value in result.items() if key != "files"})
    if not (result["two_runs_identical"] and result["killed_run_identical"]):
        raise SystemExit("the artefacts differ")


if __name__ == "__main__":
    main()
