"""The order of what TVM leaves to the addresses of its objects, so that equal programs give equal code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.relax import utils

_PREFIX = "shape_func"


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
