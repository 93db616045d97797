"""What the garbage collector passes over during a run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bitlower.tools.runs.set_aside import setting_aside


class Ring:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _none_frozen() -> Iterator[None]:
    """What conftest.py has frozen is as usual for a test, and is passed over again behind it."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_lives_is_passed_over_until_the_end() -> None:
    with setting_aside() as set_aside:
        ring = Ring()
        assert any(entry is ring for entry in gc.get_objects())
        set_aside()
        assert not any(entry is ring for entry in gc.get_objects())
    assert gc.get_freeze_count() == 0


def test_garbage_goes_whether_it_was_set_aside_or_not() -> None:
    with setting_aside() as set_aside:
        ring = Ring()
        set_aside()
        gone = weakref.ref(ring)
        del ring
        gc.collect()
        assert gone() is not None
        set_aside()
        assert gone() is None


def test_all_is_as_before_when_a_run_fails() -> None:
    with pytest.raises(ValueError, match="a fault"), setting_aside():
        raise ValueError("a fault")
    assert gc.get_freeze_count() == 0


def test_a_process_with_frozen_objects_is_left_alone() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with setting_aside() as set_aside:
        set_aside()
    assert abs(gc.get_freeze_count() - before) < 100
    assert gc.get_freeze_count() > 1000
