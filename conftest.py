"""What all tests share: hypothesis without time limits, traces, golden files that ``--update-golden`` writes anew."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("bitlower", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("bitlower")


_TRACES = "BITLOWER_TRACES"


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of a run share what one of them has traced, in a folder of the run's own."""
    if _TRACES not in os.environ:
        os.environ[_TRACES] = tempfile.mkdtemp(prefix="bitlower-traces-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_TRACES), ignore_errors=True))


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what lives as long as the run: modules and the tests themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden`` and ``--nightly``."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    parser.addoption("--nightly", action="store_true", help="run the cases marked `nightly` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``nightly``, unless a run asks for it."""
    if not config.getoption("--nightly"):
        left_out = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: ``text`` is what ``golden/<name>.txt`` beside the test holds, at most 50 lines."""

    def check(name: str, text: str) -> None:
        path = request.path.parent / "golden" / f"{name}.txt"
        assert len(text.splitlines()) <= 50, f"{name}: a golden text has at most 50 lines"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"there is no {path.name}; run pytest --update-golden and read what it wrote"
        assert text == path.read_text()

    return check
