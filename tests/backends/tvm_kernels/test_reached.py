"""Every function of the schedules is there for whole programs: some small model reaches it on its way to a library."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import bitlower.backends.tvm_kernels.schedules as schedules
from bitlower.backends.tvm_kernels.inspect.launches import launches_of
from bitlower.backends.tvm_kernels.library.compile import compile_program
from bitlower.backends.tvm_kernels.relax.program import build_module
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.ir import Program

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
TOLERANCE, fused, tokens, worst = (_HELPERS[name] for name in ("TOLERANCE", "fused", "tokens", "worst"))
FOLDER = Path(schedules.__file__).parent
GROUPS = ("wide", "W4A8-g8-asym")
"""Zero points in groups beside codes, heads of whole vectors, outputs that end within a vector."""
ZEROS = ("wide", "W4A16-g8-asym")
ODD = ("bert", "W3A16-g16")
"""Groups of 16 inputs in 3 bits, which are packed 32 at a time."""
TOKENS = ("bert", "W8A8-token")
REACHED = (
    (GROUPS, (Target.LLVM, Target.VNNI, Target.CUDA)),
    (ZEROS, (Target.LLVM, Target.VNNI, Target.CUDA)),
    (ODD, (Target.VNNI,)),
    (TOKENS, (Target.LLVM, Target.OPENCL)),
    (("bert", "W8A8-full"), (Target.VNNI, Target.CUDA)),
    (("bert", "W4A8-g16-upeg3"), (Target.VNNI,)),
    (("llama", "W4A16-g16"), (Target.CUDA,)),
)


def small(name: tuple[str, str]) -> Program:
    model, scheme = name
    return fused(model, scheme, layers=1)


def defined() -> set[tuple[str, int]]:
    """The functions of the schedules: file and line of each."""
    files = {path: ast.parse(path.read_text()) for path in FOLDER.rglob("*.py")}
    return {
        (str(path.relative_to(FOLDER)), min([node.lineno, *(line.lineno for line in node.decorator_list)]))
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


@contextmanager
def called(functions: set[tuple[str, int]]) -> Iterator[None]:
    """Note the functions of the schedules that are called meanwhile."""
    begin = f"{FOLDER}/"

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(begin):
            functions.add((code.co_filename.removeprefix(begin), code.co_firstlineno))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def test_whole_programs_reach_every_function_of_the_schedules() -> None:
    """What no program needs would be tested by itself for nothing."""
    programs = {name: small(name) for name, _ in REACHED}
    functions = set[tuple[str, int]]()
    with called(functions):
        for name, targets in REACHED:
            for target in targets:
                build_module(programs[name], target)
        launches_of(programs[TOKENS], {"batch": 2, "sequence": 7}, Target.OPENCL)  # fuses what lies between, too
    assert sorted(defined() - functions) == []


@pytest.mark.parametrize(
    "name", [GROUPS, ZEROS, pytest.param(ODD, marks=pytest.mark.nightly)], ids=lambda name: name[1]
)
def test_they_give_the_numbers_of_their_programs(name: tuple[str, str]) -> None:
    """Few rows, and so many that weights are unpacked once."""
    program = small(name)
    library = compile_program(program)
    for rows, length in ((1, 3), (5, 14)):
        assert worst(program, library, tokens(program, rows, length, seed=6)) < TOLERANCE
