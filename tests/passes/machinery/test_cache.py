from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bitlower.ir import BitlowerError, Program, get_tensor, serialize, set_tensor
from bitlower.passes import Cache, Context, Contract, Ledger, Pass, PassManager, parse_pipeline
from bitlower.passes._machinery import cache as store
from bitlower.passes._machinery import digest
from bitlower.passes._machinery.cache import Entry, aligned
from bitlower.passes._machinery.digest import digest_code
from bitlower.passes._machinery.results import encode_results
from bitlower.passes.precision.assign_precision import AssignPrecision

RUNS: list[str] = []  # the passes that really ran


@pytest.fixture(autouse=True)
def _no_runs() -> None:
    RUNS.clear()


@dataclass(frozen=True)
class Norms:
    """What ``measure`` finds."""

    by_name: dict[str, float]
    pairs: tuple[tuple[int, str], ...]
    largest: float = float("inf")


@dataclass(frozen=True)
class Opaque:
    value: object


@dataclass(frozen=True)
class Measure(Pass):
    name: ClassVar[str] = "measure"
    contract: ClassVar[Contract] = Contract.ANALYSIS
    opaque: bool = False
    scale: float = 1.0

    def run(self, program: Program, context: Context) -> bool:
        RUNS.append("measure")
        norms = {name: self.scale * float(t.detach().norm()) for name, t in program.tensors()}
        context.put(Opaque(object()) if self.opaque else Norms(norms, ((1, "one"), (2, "two"))))
        return False


@dataclass(frozen=True)
class Shrink(Pass):
    """Divide a weight by what was measured, or by data, or by chance."""

    name: ClassVar[str] = "shrink"
    by: str = "nothing"

    def run(self, program: Program, context: Context) -> bool:
        RUNS.append(f"shrink {self.by}")
        divisor: Any = 2.0
        if self.by == "norms":
            divisor = context[Norms].by_name["model/head.weight"]
        if self.by == "calibration":
            divisor = max(float(batch["x"].abs().max()) for batch in context.calibration)
        if self.by == "seed":
            divisor = 1.0 + torch.rand((), generator=context.generator("shrink"))
        weight = get_tensor(program.module, "head.weight").detach()
        set_tensor(program.module, "head.weight", torch.nn.Parameter(weight / divisor))
        return True


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4, 16, generator=generator)} for _ in range(2)]


def run(
    program: Program,
    cache: Cache | None,
    passes: list[Pass],
    *,
    calibration: int = 1,
    evaluation: int = 2,
    seed: int = 0,
) -> tuple[str, str, Context, list[str]]:
    """Digest, ledger and context after ``passes``, and which of them ran."""
    RUNS.clear()
    ledger = Ledger()
    context = Context(batches(calibration), batches(evaluation), seed)
    result = PassManager(passes, [ledger], cache=cache).run(program, context)
    return result.digest(), json.dumps(ledger.to_dict()), context, list(RUNS)


PIPELINE = [Measure(), Shrink("norms"), Measure(), Shrink("calibration"), Shrink("seed")]


def test_a_second_run_computes_nothing_and_gives_the_same(tiny_program: Program, tmp_path: Path) -> None:
    plain = run(tiny_program, None, PIPELINE)
    first = run(tiny_program, Cache(tmp_path), PIPELINE)
    second = run(tiny_program, Cache(tmp_path), PIPELINE)
    assert plain[:2] == first[:2] == second[:2]
    assert len(first[3]) == 5
    assert second[3] == []
    assert first[2].results == second[2].results


def test_results_in_the_context_are_restored(tiny_program: Program, tmp_path: Path) -> None:
    first = run(tiny_program, Cache(tmp_path), [Measure()])[2].results
    second = run(tiny_program, Cache(tmp_path), [Measure()])[2].results
    assert first == second
    assert list(second) == [Norms]
    assert second[Norms].largest == float("inf")


def test_the_run_goes_on_where_something_changed(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    run(tiny_program, cache, PIPELINE)
    assert run(tiny_program, cache, [*PIPELINE[:3], Shrink()])[3] == ["shrink nothing"]
    other = run(tiny_program, cache, [Measure(scale=2.0), Shrink("norms")])
    assert other[3] == ["measure", "shrink norms"]  # the result differs though the program is the same


def test_only_the_data_that_a_pass_reads_count(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    base = run(tiny_program, cache, PIPELINE)
    assert run(tiny_program, cache, PIPELINE, calibration=5)[3] == ["shrink calibration", "shrink seed"]
    assert run(tiny_program, cache, PIPELINE, seed=5)[3] == ["shrink seed"]
    other = run(tiny_program, cache, PIPELINE, evaluation=5)
    assert other[3] == []
    assert other[0] == base[0]
    assert other[1] != base[1]  # the ledger's rows are those of the new batches
    assert other[1] == run(tiny_program, None, PIPELINE, evaluation=5)[1]


def test_the_rows_belong_to_the_ledgers_reference(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    halved = PassManager([Shrink()]).run(tiny_program, Context())
    run(tiny_program, cache, [Shrink(), Shrink()])
    found = run(halved, cache, [Shrink()])  # the second step above, but compared with another program
    assert found[3] == []
    assert found[1] == run(halved, None, [Shrink()])[1]


def test_rows_are_added_without_the_program(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass gave is encoded once, and the ledger's key is asked for once a pass."""
    encoded: list[Program] = []
    asked: list[Context] = []
    plain, key = store.encode, Ledger.key
    monkeypatch.setattr(store, "encode", lambda program: encoded.append(program) or plain(program))
    monkeypatch.setattr(Ledger, "key", lambda self, context: asked.append(context) or key(self, context))
    first = run(tiny_program, Cache(tmp_path), [Shrink(), Shrink("seed")])
    assert (len(encoded), len(asked)) == (2, 2)
    assert run(tiny_program, Cache(tmp_path), [Shrink(), Shrink("seed")])[:2] == first[:2]


def test_rows_are_stored_with_an_entry_that_has_gone(tiny_program: Program, tmp_path: Path) -> None:
    cache, entry = Cache(tmp_path), Entry(changed=True, program=tiny_program)
    cache.put("aa", entry)
    entry.rows["row"] = 1
    next(tmp_path.glob("entries/*/*.json")).unlink()
    cache.put_rows("aa", entry)
    stored = cache.get("aa")
    assert stored is not None
    assert stored.program is not None
    assert (stored.program.digest(), stored.rows) == (tiny_program.digest(), {"row": 1})


def test_a_change_of_the_code_counts(tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    run(tiny_program, cache, [Shrink()])
    source = Path(__file__).read_text()
    (tmp_path / "edited.py").write_text(source.replace("divisor: Any = 2.0", "divisor: Any = 4.0"))
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / "edited.py"))
    assert run(tiny_program, cache, [Shrink()])[3] == ["shrink nothing"]


def test_a_write_into_the_input_program_counts(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    run(tiny_program, cache, [Shrink()])
    with torch.no_grad():
        get_tensor(tiny_program.module, "up.weight").data[0, 0] += 1.0
    changed = run(tiny_program, cache, [Shrink()])
    assert changed[3] == ["shrink nothing"]
    assert changed[0] == run(tiny_program, None, [Shrink()])[0]


def test_unchanged_weights_are_stored_once(tiny_program: Program, tmp_path: Path) -> None:
    run(tiny_program, Cache(tmp_path), [Shrink(), Shrink(), Shrink()])
    distinct = len({t.detach().numpy().tobytes() for _, t in tiny_program.tensors()})
    assert len(list(tmp_path.glob("tensors/*/*"))) == distinct + 2  # three new heads in place of the old one
    assert len(list(tmp_path.glob("entries/*/*"))) == 3


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("entries", "cut"),
        ("entries", "flip"),
        ("uses", "flip"),
        *(("tensors", d) for d in ("cut", "flip", "empty", "gone")),
    ],
)
def test_a_damaged_file_counts_as_missing(tiny_program: Program, tmp_path: Path, kind: str, damage: str) -> None:
    cache = Cache(tmp_path)
    expected = run(tiny_program, cache, PIPELINE)
    for path in tmp_path.glob(f"{kind}/*/*"):
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes({"cut": raw[: len(raw) // 2], "flip": raw, "empty": b"", "gone": b""}[damage])
        if damage == "gone":
            path.unlink()
    again = run(tiny_program, cache, PIPELINE)
    assert again[:2] == expected[:2]
    assert again[3] != []
    assert run(tiny_program, cache, PIPELINE)[3] == []


def test_a_result_that_cannot_be_saved_is_an_error_that_names_it_and_the_pass(
    tiny_program: Program, tmp_path: Path
) -> None:
    passes = [Shrink(), Measure(opaque=True), Shrink()]
    for _ in range(2):
        with pytest.raises(
            BitlowerError, match=r"the pass 'measure' left .*:Opaque cannot be saved.* without the cache"
        ):
            run(tiny_program, Cache(tmp_path), passes)
    assert run(tiny_program, None, passes)[3] == ["shrink nothing", "measure", "shrink nothing"]


def test_a_result_of_a_foreign_type_is_not_loaded(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    run(tiny_program, cache, [Measure()])
    (path,) = tmp_path.glob("entries/*/*.json")
    entry = cache.get(path.stem)
    assert entry is not None
    cache.put(path.stem, Entry(False, None, [["subprocess:Popen", {"args": ["true"]}]]))
    assert run(tiny_program, cache, [Measure()])[3] == ["measure"]


def test_what_a_dataclass_cannot_carry_through_json_is_refused() -> None:
    @dataclass(frozen=True)
    class Sets:
        values: tuple[Any, ...]

    with pytest.raises(BitlowerError, match=r"Sets cannot be saved; use frozen dataclasses of plain data"):
        encode_results({Sets: Sets(((1, 2),))})  # the inner tuple would come back as a list


def test_tensors_keep_their_layout_and_aliases(tmp_path: Path, tiny_program: Program) -> None:
    module = tiny_program.module
    set_tensor(module, "up.weight", torch.nn.Parameter(torch.randn(16, 32).t()))
    cache = Cache(tmp_path)
    cache.put("key", Entry(True, tiny_program))
    entry = cache.get("key")
    assert entry is not None
    assert entry.program is not None
    assert entry.program.digest() == tiny_program.digest()
    assert get_tensor(entry.program.module, "up.weight").stride() == (1, 32)
    assert entry.program.size_bytes() == tiny_program.size_bytes()


@pytest.mark.parametrize(
    "file",
    [
        "ir/quantization/numerics.py",
        "ir/quantization/ranges.py",
        "passes/quantizers/calibrate.py",
        "passes/x/new.py",
    ],
)
def test_an_edit_anywhere_in_ir_or_passes_changes_the_code_of_each_pass(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # assign-precision runs calibrate: what it gave before calibrate.py was edited is not what it would give now
    own = Path(digest.__file__).parents[1]
    for folder in (own, own.parent / "ir"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))

    def code() -> str:
        digest._digest_own.cache_clear()
        return digest_code(AssignPrecision)

    here = code()
    try:
        monkeypatch.setattr(digest, "__file__", str(tmp_path / "passes" / "_machinery" / "digest.py"))
        assert code() == here
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with (tmp_path / file).open("a") as source:
            source.write("# edited\n")
        assert code() != here
    finally:
        monkeypatch.undo()
        assert code() == here


def test_a_file_that_moves_changes_the_code_of_each_pass(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "one.py").write_text("1")
    before = digest._digest_folder(tmp_path)
    (tmp_path / "one.py").rename(tmp_path / "a" / "one.py")
    assert digest._digest_folder(tmp_path) != before


def test_a_program_on_odd_addresses_is_moved(tiny_program: Program) -> None:
    raw = torch.zeros(4 * 16 + 1)
    set_tensor(tiny_program.module, "head.weight", torch.nn.Parameter(raw[1:].reshape(4, 16)))
    assert get_tensor(tiny_program.module, "head.weight").data_ptr() % 64
    moved = aligned(tiny_program)
    assert all(tensor.data_ptr() % 64 == 0 for _, tensor in moved.tensors())
    assert moved.digest() == tiny_program.digest()


def test_prune_removes_what_was_used_longest_ago(tiny_program: Program, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for index, by in enumerate(("nothing", "calibration", "seed")):
        run(tiny_program, cache, [Shrink(by)])
        for path in tmp_path.glob("entries/*/*.json"):
            if path.stat().st_mtime > 1e9:
                os.utime(path, (1e8 + index, 1e8 + index))
    run(tiny_program, cache, [Shrink()])  # used again: now the newest

    def total() -> int:
        return sum(p.stat().st_size for kind in ("entries", "tensors") for p in tmp_path.glob(f"{kind}/*/*"))

    (tmp_path / "tensors" / "ab").mkdir(exist_ok=True)
    (tmp_path / "tensors" / "ab" / ".unfinished").write_bytes(b"1234")
    before = total()
    assert cache.prune(before) == 4
    assert cache.prune(before - 5) > 0
    assert run(tiny_program, cache, [Shrink("seed")])[3] == []
    assert run(tiny_program, cache, [Shrink()])[3] == []
    assert run(tiny_program, cache, [Shrink("calibration")])[3] == ["shrink calibration"]
    cache.prune(0)
    assert total() == 0


def test_a_full_disk_is_named_and_leaves_no_half_file(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BitlowerError, match=r"the cache .* cannot be written \(No space left on device\); free some"):
        run(tiny_program, Cache(tmp_path), [Shrink()])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from bitlower.ir import serialize
from bitlower.passes import Cache, Context, Ledger, PassManager, parse_pipeline
import json

folder, moment = Path(sys.argv[1]), int(sys.argv[2])
steps = iter(range(10**9))
for name in ("fsync", "utime"):  # die at the given file operation
    real = getattr(os, name)
    def dying(*args, real=real, **kwargs):
        if next(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, dying)
data = [{"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]
ledger = Ledger()
passes = parse_pipeline("clean,quantize{scheme=W8A8-full},calibrate,lower-integer")
program = serialize.load(folder / "program")
result = PassManager(passes, [ledger], cache=Cache(folder / "cache")).run(program, Context(data[:2], data[2:]))
print(result.digest(), json.dumps(ledger.to_dict()))
"""


def test_a_run_killed_at_any_moment_gives_the_same_in_the_end(
    tiny_program: Program, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    serialize.save(tiny_program, tmp_path / "program")
    data = [{"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    ledger = Ledger()
    passes = parse_pipeline("clean,quantize{scheme=W8A8-full},calibrate,lower-integer")
    plain = PassManager(passes, [ledger]).run(serialize.load(tmp_path / "program"), Context(data[:2], data[2:]))
    for moment in (5, 20, 10**9):
        done = run_script(SCRIPT, tmp_path, moment)
        assert done.returncode == (0 if moment == 10**9 else -signal.SIGKILL), done.stderr
    assert done.stdout.strip() == f"{plain.digest()} {json.dumps(ledger.to_dict())}"
