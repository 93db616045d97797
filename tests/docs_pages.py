"""The documents as the tests read them: their text, code blocks, sections and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *DOCS]
TEXT = {path: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    page: Path
    language: str
    mark: str
    body: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.language}-{self.mark}-{self.body.count(chr(10))}"


def fences(language: str, *marks: str) -> list[Fence]:
    """All code blocks in ``language``; only those with one of ``marks`` behind it, if any are given."""
    found = []
    for page, text in TEXT.items():
        for match in FENCE.finditer(text):
            name, _, mark = match["info"].strip().partition(" ")
            if name == language and (not marks or mark in marks):
                found.append(Fence(page, name, mark, match["body"]))
    return found


def prose(page: Path) -> str:
    return FENCE.sub("", TEXT[page])


def section(page: str, heading: str, part: str = "") -> str:
    """What stands below ``## heading`` of a document, or below ``### part`` of it, up to the next such heading."""
    text = TEXT[ROOT / "docs" / page]
    for mark, name in (("##", heading), ("###", part)):
        parts = re.split(rf"^{mark} (.*)$", text, flags=re.MULTILINE)
        text = dict(zip(parts[1::2], parts[2::2], strict=True))[name] if name else text
    return text


def rows(text: str, header: str = "") -> list[list[str]]:
    """The cells of a section's table lines, headers and rules left out; of tables whose header starts so, if given."""
    found: list[list[str]] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        assert set(cells[1][0]) == {"-"}, f"no table: {block}"
        found += cells[2:] if header in ("", cells[0][0]) else []
    return found


def names(table: list[list[str]]) -> list[str]:
    """What stands in backticks in the first column."""
    return [name for row in table for name in re.findall(r"`([^`]+)`", row[0])]
