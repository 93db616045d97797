"""Objects that the garbage collector need not look at: those of the libraries and of a model that was loaded.

A full collection walks all objects, hundreds of thousands after the imports alone, and one follows whenever a quarter
has come on top.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def setting_aside() -> Iterator[Callable[[], None]]:
    """What lives by now is set aside, and what lives whenever the function is called; at the end all is as before.

    What is set aside and dropped later stays until the next call. A process that has frozen objects of its own is left
    alone.
    """
    if gc.get_freeze_count():
        yield lambda: None
        return
    gc.freeze()
    try:
        yield _set_aside
    finally:
        gc.unfreeze()


def _set_aside() -> None:
    """Set aside what lives by now; garbage, also what became it since the last time, is collected."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
