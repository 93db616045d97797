"""Gives changed and hostile files to the project and counts how they end.

Every input must end in a result or in one error of ours that fits on a screen, within seconds, within bounded memory,
and leave nothing behind. What an input is follows from the seed, its kind and its number alone:

    python tests/fuzz/run.py --inputs 10000 --seed 0 --keep bad
    python tests/fuzz/run.py --kinds configuration --only 17
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor"))
warnings.simplefilter("ignore")

from harness import GOOD, run  # noqa: E402
from kinds import Kinds  # noqa: E402


def main() -> int:
    """Run, print the tally; 1 if an input ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1100, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", help="these kinds only")
    parser.add_argument("--only", type=int, help="this input of each kind only")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that end badly")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        kinds = Kinds(Path(place))
        names = options.kinds or list(kinds.makers)
        tally: dict[str, Counter[str]] = {}
        for number, name in enumerate(names):
            count = options.inputs // len(names) + (number < options.inputs % len(names))
            indices = list(range(count)) if options.only is None else [options.only]
            tally[name] = Counter()
            for outcome in run(name, kinds.makers[name](), indices, options.seed, options.keep):
                tally[name][outcome.result] += 1
                if outcome.result not in GOOD:
                    print(f"{name} {outcome.index}: {outcome.result}: {outcome.detail}", flush=True)
            print(name, dict(sorted(tally[name].items())), flush=True)
    print(table(tally))
    return int(any(result not in GOOD for counts in tally.values() for result in counts))


def table(tally: dict[str, Counter[str]]) -> str:
    """The counts as Markdown: a row a kind, a column an outcome."""
    columns = [*GOOD, *sorted({result for counts in tally.values() for result in counts} - set(GOOD))]
    rows = [["kind", "inputs", *columns], ["---", *["---:"] * (len(columns) + 1)]]
    total = sum(tally.values(), Counter())
    for name, counts in [*tally.items(), ("all", total)]:
        rows.append([name, str(counts.total()), *(str(counts[column]) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
