"""All that leans on how TVM 0.27 is made inside, and not on what it documents: what an upgrade reads first.

- the order of what TVM leaves to the addresses of its objects, so that equal programs give equal code;
- its converters for PyTorch, taken one at a time;
- the callback that compiles CUDA source, and the bytes that a library packs its modules in;
- the text of its virtual machine's code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import tvm
import tvm_ffi
from torch import fx
from tvm import tirx
from tvm.relax import utils
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from bitlower.ir import CheckError

_PREFIX = "shape_func"
_CALLED = re.compile(r"^\s*call\s+(\w+)\s", re.MULTILINE)


def sort_shape_functions() -> Any:
    """A pass: functions that compute dimensions store them in the order of their places.

    TVM emits these stores in the order of a set of pointers. None reads what another of the same function stores. They
    have one argument and are marked as free of aliases: in its code for CPUs TVM goes by the mark of the last function
    of a module for all of them, and without it LLVM keeps the sums of kernels in memory.
    """

    def sort(module: Any, context: Any) -> Any:
        copy = module.clone()
        for name, function in module.functions_items():
            if name.name_hint.startswith(_PREFIX) and isinstance(function.body, tirx.SeqStmt):
                stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
                function = function.with_body(tirx.SeqStmt(stores))
            if name.name_hint.startswith(_PREFIX):
                copy.update_func(name, function.with_attr("tirx.noalias", True))
        return copy

    return tvm.transform.module_pass(sort, opt_level=0, name="SortShapeFunctions")


@contextmanager
def variables_in_order() -> Iterator[None]:
    """Let TVM pass the dimensions that a function needs beside its tensors in the order in which they are met.

    It collects them in a ``set`` of Python's, whose order is that of addresses; meanwhile the name means an ordered one
    in that module.
    """
    utils.set = _OrderedSet
    try:
        yield
    finally:
        del utils.set


class _OrderedSet(dict[Any, None]):
    """A set in the order of insertion, as far as TVM uses it."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__((item, None) for item in items)

    def add(self, item: Any) -> None:
        self[item] = None

    def update(self, items: Iterable[Any]) -> None:  # type: ignore[override]
        for item in items:
            self.add(item)

    def __sub__(self, other: _OrderedSet) -> _OrderedSet:
        return _OrderedSet(item for item in self if item not in other)


_CALLBACK = "tvm_callback_cuda_compile"


def with_code(blob: bytes, source: bytes, code: bytes) -> bytes:
    """Packed modules with ``code`` in place of the CUDA ``source``.

    Raises:
        CheckError: the source is not there, and neither is other code.
    """
    total, start = _read(blob, 0)
    places = [start]
    for _ in range(2):  # how modules import each other: two arrays of numbers
        count, at = _read(blob, places[-1])
        places.append(at + 8 * count)
    at, pieces = places[-1], [blob[start : places[-1]]]
    while at < 8 + total:
        kind, at = _text(blob, at)
        pieces.append(_packed(kind))
        if kind == b"_lib":
            continue
        module, at = _text(blob, at)
        pieces.append(_packed(_compiled(module, source, code) if kind == b"cuda" else module))
    return _packed(b"".join(pieces))


def _compiled(module: bytes, source: bytes, code: bytes) -> bytes:
    """The bytes of the module of CUDA: its functions stay, its format and its code change."""
    form, at = _text(module, 0)
    if form != b"cuda":
        return module
    functions, end = module[at:], _packed(source)
    if not functions.endswith(end):
        raise CheckError("TVM packs CUDA modules in another way than is known")
    return _packed(b"fatbin") + functions.removesuffix(end) + _packed(code)


def _read(blob: bytes, at: int) -> tuple[int, int]:
    return int.from_bytes(blob[at : at + 8], "little"), at + 8


def _text(blob: bytes, at: int) -> tuple[bytes, int]:
    size, at = _read(blob, at)
    return blob[at : at + size], at + size


def _packed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@contextmanager
def compiling_cuda_by(compiler: Callable[[str], bytes]) -> Iterator[None]:
    """Within, TVM compiles CUDA source by ``compiler``, where it has a driver and compiles at once."""
    before = tvm_ffi.get_global_func(_CALLBACK)
    tvm_ffi.register_global_func(_CALLBACK, compiler, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def packed_modules(module: Any) -> bytes:
    """What TVM packs into a library: a sequence of modules."""
    return bytes(tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy())


@cache
def imported_names() -> frozenset[str]:
    """The names of the operators that TVM's importer for PyTorch converts."""
    return frozenset(ExportedProgramImporter().convert_map)


def imported(builder: Any, node: fx.Node, name: str, values: Mapping[fx.Node, Any]) -> Any:
    """What TVM's importer makes of one operator.

    Args:
        builder: within a function.
        node: the operator.
        name: one of :func:`imported_names`.
        values: what its operands are.
    """
    importer = ExportedProgramImporter()
    importer.block_builder = builder
    importer.env.update(values)
    return importer.convert_map[name](node)


def called_functions(executable: Any) -> list[str]:
    """The functions that TVM's virtual machine calls, by name, one for each place in the code.

    Args:
        executable: compiled, or the module of a library that was loaded.
    """
    text = executable.as_text if hasattr(executable, "as_text") else executable["as_text"]
    return _CALLED.findall(str(text()))
