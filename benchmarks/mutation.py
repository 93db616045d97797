"""Mutation score of ``ir/`` and of the passes' arithmetic: which share of small mistakes the tests notice.

A site is an operator, a number, a boolean, a condition or a loop. Sites are drawn with a seed, each is changed by one
of Cosmic Ray's mutation operators, and the tests of its module run until one fails. Only the operators are Cosmic
Ray's: its runner writes mutants over the sources and starts a process that imports torch for each, and mutmut takes the
path of a file for the name of its module, where ``ir/ops.py`` is ``bitlower.ir.ops``. Here a mutant lives in the memory
of a forked process: no file is changed, and torch is imported once. Linux only.

A site is drawn by a hash of its line's text, so two revisions are sampled alike where their sources are alike.
``--revision REV`` takes sources and tests of another revision. ``--again FILE`` tries the mutants of an earlier result,
as far as their lines still stand, and of those only what survived: fair where tests were only added since. With
``--since REV`` only test functions that are not those of that commit run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from _common import show_table, write_result
from _mutants import Key, Mutant, sample

ROOT = Path(__file__).resolve().parents[1]
# Imported before the forks, so that each mutant finds them loaded; nothing of bitlower may be.
PRELOADED = (
    *(
        "pytest",
        "hypothesis",
        "scipy.stats",
        "scipy.optimize",
        "networkx",
        "onnxruntime",
        "torch.export",
        "torch._dynamo",
    ),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
)
# The files, each with the tests of its module: of those in tests/ that are there.
TARGETS = {
    "ir/permutation/order.py": "ir/permutation/test_axes ir/permutation/test_domains",
    "ir/permutation/relations.py": "ir/permutation/test_axes ir/permutation/test_domains",
    "ir/permutation/rules.py": "ir/permutation/test_axes ir/permutation/test_domains",
    "ir/dataflow.py": "ir/test_dataflow",
    "ir/permutation/domains.py": "ir/permutation/test_domains",
    "ir/files.py": "ir/test_files",
    "ir/folding.py": "ir/test_folding",
    "ir/quantization/granularity.py": "ir/quantization/test_granularity ir/quantization/test_grid",
    "ir/quantization/grid.py": "ir/quantization/test_grid ir/quantization/test_numerics",
    "ir/json_files.py": "ir/test_json_files",
    "ir/kernels/attention.py": "ir/kernels/test_kernel_attention",
    "ir/verifier/kernels.py": "ir/verifier/test_kernel_checks ir/kernels/test_kernels",
    "ir/kernels/references.py": "ir/kernels/test_kernel_ops",
    "ir/kernels/rotary.py": "ir/kernels/test_kernel_rotary ir/kernels/test_kernel_attention",
    "ir/kernels/description.py": "ir/kernels/test_kernels ir/kernels/test_kernel_ops",
    "ir/lockstep.py": "ir/test_lockstep ir/test_observe",
    "ir/quantization/numerics.py": "ir/quantization/test_numerics ir/quantization/test_grid ir/test_ops",
    "ir/observe.py": "ir/test_observe ir/test_lockstep",
    "ir/ops.py": "ir/test_ops ir/quantization/test_numerics",
    "ir/quantization/packing.py": "backends/tvm_kernels/test_packing",
    "ir/program_data.py": "ir/test_program ir/test_fit",
    "ir/program.py": "ir/test_program ir/test_serialize ir/test_text",
    "ir/permutation/reorder.py": "ir/permutation/test_reorder ir/permutation/test_domains",
    "ir/verifier/scales.py": "ir/verifier/test_verifier ir/verifier/test_kernel_checks",
    "ir/quantization/scheme.py": "ir/quantization/test_scheme",
    "ir/document.py": "ir/test_serialize",
    "ir/tensors.py": "ir/test_program",
    "ir/serialize.py": "ir/test_serialize",
    "ir/storage.py": "ir/test_storage",
    "ir/text.py": "ir/test_text",
    "ir/types.py": "ir/test_types",
    "ir/verifier/verify.py": "ir/verifier/test_verifier ir/verifier/test_verifier_traced",
    "passes/rounding/_adaround_solver.py": "passes/rounding/test_adaround_solver",
    "passes/outliers/_channel_statistics.py": (
        "passes/outliers/test_outlier_statistics passes/outliers/test_peg_permute passes/outliers/test_smooth"
    ),
    "passes/rounding/_gptq_factor.py": "passes/rounding/test_gptq_factor passes/rounding/test_gptq_solver",
    "passes/rounding/_gptq_grids.py": "passes/rounding/test_gptq_grids passes/rounding/test_gptq_solver",
    "passes/rounding/_gptq_refine.py": "passes/rounding/test_gptq_refine",
    "passes/rounding/_gptq_solver.py": (
        "passes/rounding/test_gptq_solver passes/rounding/test_gptq_refine passes/rounding/test_gptq_grids"
    ),
    "passes/outliers/_hadamard.py": "passes/outliers/test_hadamard",
    "passes/rounding/_hessian.py": "passes/rounding/test_hessian passes/rounding/test_gptq_solver",
    "passes/precision/_knapsack.py": "passes/precision/test_knapsack",
    "passes/precision/_measures.py": "passes/precision/test_measures",
    "passes/outliers/_orders.py": "passes/outliers/test_orders passes/outliers/test_peg_permute",
    "passes/outliers/_statistics.py": "passes/outliers/test_outlier_statistics",
    "ir/quantization/ranges.py": "passes/quantizers/test_ranges passes/quantizers/test_calibrate_groups",
    "passes/precision/_roofline.py": "passes/precision/test_roofline",
    "ir/token_weights.py": "passes/rounding/test_hessian",
    "ir/tokens.py": "ir/test_tokens",
    "tools/evaluation/metrics.py": "tools/evaluation/test_metrics",
}
MEMORY = 12 << 30  # bytes that the tests of a mutant may ask for
SECONDS = 120  # of processor time that the tests of a mutant get: three times what the longest take
PATIENCE = 3600  # seconds of the clock, for what waits for itself


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds bitlower's modules in a tree, and one of them in memory."""

    def __init__(self, tree: Path, mutant: Mutant | None) -> None:
        folders = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
        self.folders = {name: tree / folder for name, folder in folders.items()}
        self.changed = {tree / mutant.site.file: mutant.source} if mutant else {}

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of bitlower's; None for others."""
        if name in self.folders:
            folder = self.folders[name]
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        package, _, stem = name.rpartition(".")
        file = self.folders[package] / f"{stem}.py" if package in self.folders else None
        if file in self.changed:
            return importlib.util.spec_from_file_location(name, file, loader=self)
        return importlib.util.spec_from_file_location(name, file) if file and file.is_file() else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave that to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed source."""
        exec(compile(self.changed[Path(str(module.__file__))], str(module.__file__), "exec"), module.__dict__)


def run_tests(tree: Path, mutant: Mutant | None, tests: Sequence[str]) -> str:
    """Run tests in a fork, up to the first that fails: killed, survived, timeout or crash."""
    child = os.fork()
    if not child:
        _be_child(tree, mutant, tests)
    end = time.monotonic() + PATIENCE
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    if os.WIFSIGNALED(done[1]):
        return "timeout" if os.WTERMSIG(done[1]) in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return "killed" if os.WEXITSTATUS(done[1]) else "survived"


def _be_child(tree: Path, mutant: Mutant | None, tests: Sequence[str]) -> None:
    """Run pytest and end the process with its exit code."""
    import pytest

    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        sys.dont_write_bytecode = True
        sys.meta_path.insert(0, Sources(tree, mutant))
        with tempfile.TemporaryDirectory() as folder:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/t", *tests]))
    finally:
        os._exit(code)


def measure(
    tree: Path,
    mutants: Sequence[Mutant],
    known: Mapping[Key, str],
    since: str,
    end: float,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Try the mutants in their order until the clock shows ``end``.

    Args:
        tree: the sources and their tests.
        mutants: of these sources.
        known: results of an earlier run; what did not survive there is not tried again.
        since: a commit whose tests are not run again; none if empty.
        end: by ``time.monotonic``.
        report: is given a line for each mutant.

    Raises:
        SystemExit: tests fail without a mutant.
    """
    rows: list[dict[str, Any]] = []
    sets: dict[tuple[str, ...], set[str]] = {}
    for mutant in mutants:
        if time.monotonic() > end:
            break
        site, tests, result = mutant.site, tests_of(mutant.site.file, tree), known.get(mutant.key, "survived")
        tests = new_tests(tree, since, tests) if since else tests
        if result == "survived" and tests:
            result = run_tests(tree, mutant, tests)
            sets.setdefault(tests, set()).add(result)
        place = {"file": site.file, "line": site.line, "before": site.text, "after": mutant.after}
        rows.append(place | {"operator": mutant.operator, "result": result})
        report(f"{len(rows)}/{len(mutants)} {result} {site.file}:{site.line} {site.text} -> {mutant.after}")
    for tests, results in sets.items():  # where one survived, the tests do pass
        if "survived" not in results and run_tests(tree, None, tests) != "survived":
            raise SystemExit(f"{' '.join(tests)}: fails without a mutant")
    return rows


def read_known(path: Path) -> dict[Key, str]:
    """The mutants of an earlier result, and how each ended."""
    rows = json.loads(path.read_text())["rows"]
    return {(row["file"], row["before"], row["after"], row["operator"]): row["result"] for row in rows}


def new_tests(tree: Path, revision: str, tests: Sequence[str]) -> tuple[str, ...]:
    """The test functions of some files that a commit has not or has otherwise, as pytest names them."""
    found = []
    for test in tests:
        show = ["git", "show", f"{revision}:{test}"]
        before = subprocess.run(show, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
        old = {ast.unparse(node) for node in ast.parse(before).body}
        for node in ast.parse((tree / test).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and ast.unparse(node) not in old:
                found.append(f"{test}::{node.name}")
    return tuple(found)


def tests_of(file: str, tree: Path) -> tuple[str, ...]:
    """The test files of a source file that are in the tree."""
    return tuple(test for name in TARGETS[file].split() if (tree / (test := f"tests/{name}.py")).is_file())


def main() -> None:
    """Draw, run, print the score and write ``results/<name>.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="how many sites")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="start no mutant after so many")
    parser.add_argument("--files", nargs="*", default=list(TARGETS), choices=list(TARGETS), metavar="FILE")
    parser.add_argument("--revision", help="a commit whose sources and tests are taken instead of the working tree's")
    parser.add_argument("--again", type=Path, help="an earlier result of the same sample")
    parser.add_argument("--since", default="", help="with --again: a commit whose tests need not run again")
    parser.add_argument("--name", default="mutation", help="of the result in results/")
    options = parser.parse_args()
    prepare()
    with ExitStack() as stack:
        tree = stack.enter_context(unpacked(options.revision)) if options.revision else ROOT
        known = read_known(options.again) if options.again else {}
        files = [file for file in options.files if (tree / file).is_file()]
        mutants = sample(tree, files, options.sample, options.seed, known or None)
        end = time.monotonic() + 60 * options.minutes
        rows = measure(tree, mutants, known, options.since, end, lambda line: print(line, file=sys.stderr, flush=True))
    tally = Counter(row["result"] for row in rows)
    noticed, kinds = len(rows) - tally["survived"], ("killed", "timeout", "crash", "survived")
    score = f"{noticed / len(rows):.1%}"
    show_table(("mutants", "noticed", "score", *kinds), [(len(rows), noticed, score, *(tally[k] for k in kinds))])
    result = {"mutants": len(rows), "noticed": noticed, "score": score, "tally": dict(tally)}
    write_result(options.name, "python benchmarks/mutation.py " + " ".join(sys.argv[1:]), result | {"rows": rows})


def prepare() -> None:
    """Import what all mutants need, and settle what tests depend on.

    Raises:
        SystemExit: that imports bitlower too.
    """
    os.environ |= {"CI": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path.remove(str(Path(__file__).parent))  # kernels.py there is not the package that transformers looks for
    for name in PRELOADED:
        importlib.import_module(name)
    if any(name.partition(".")[0] == "bitlower" for name in sys.modules):
        raise SystemExit("a preloaded package imports bitlower: mutants would not be seen")


@contextmanager
def unpacked(revision: str) -> Iterator[Path]:
    """The tree of a commit, in a temporary folder."""
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
        yield Path(folder)


if __name__ == "__main__":
    main()
