"""What all tests share: hypothesis without time limits, and golden files that ``--update-golden`` writes anew."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("bitlower", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("bitlower")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


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
