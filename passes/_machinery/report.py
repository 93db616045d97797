"""What reports are shown as."""

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column names, and rows of as many cells."""
