"""What kernels take, as one strip: of part 9, where a report is asked to run the artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

from bitlower.backends.registry import find_backend
from bitlower.tools.report.blocks import Block, Picture, Prose, plain_table
from bitlower.tools.report.contents import Material
from bitlower.tools.report.svg import COLORS, LEFT, LETTER, RIGHT, WIDTH, legend, picture

HEIGHT, _TOP, _THICK = 56, 6, 40
"""Of the picture, and of the strip in it."""


def with_kernel_times(material: Material, folder: Path) -> Material:
    """``material`` with what kernels take on this machine.

    Raises:
        BitlowerError: the backend or its runtime is not there, or the model does not run here.
        CheckError: a file is damaged.
    """
    return replace(material, kernels=find_backend(material.manifest.backend).kernel_times(folder), timed=True)


def kernel_blocks(material: Material) -> Iterator[Block]:
    """The strip with its table; a sentence where the runtime does not say; nothing if nobody asked."""
    if not material.timed:
        return
    total = sum(time.microseconds for time in material.kernels)
    if not total:
        yield Prose(f"The runtime of {material.manifest.backend} does not say what its kernels take.")
        return
    shown, rest = material.kernels[: COLORS - 1], material.kernels[COLORS - 1 :]
    parts = [(time.kernel, time.microseconds) for time in shown]
    if rest:
        parts.append((f"{len(rest)} others", sum(time.microseconds for time in rest)))
    left, body = float(LEFT), []
    for index, (name, microseconds) in enumerate(parts):
        width = microseconds / total * (WIDTH - LEFT - RIGHT)
        said = f"{name}: {microseconds:.4g} µs, {microseconds / total:.1%}"
        text = f'<text class="inside" x="{left + 4:.1f}" y="{_TOP + _THICK / 2 + 4:.1f}">{escape(name)}</text>'
        body.append(
            f'<g class="s{index}"><rect class="bar" x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{_THICK}">'
            f"<title>{escape(said)}</title></rect>{text if width > len(name) * LETTER + 8 else ''}</g>"
        )
        left += width
    title = f"Time of kernels in one run, {total / 1000:.4g} ms in all"
    about = ", ".join(f"{name} {microseconds / total:.0%}" for name, microseconds in parts)
    rows = [(t.kernel, t.calls, t.microseconds, f"{t.microseconds / total:.1%}") for t in material.kernels]
    columns = ("kernel", "calls", "time (µs)", "share")
    table = plain_table(f"{title}, kernel by kernel", columns, rows, folded=True)
    head = legend([name for name, _ in parts])
    yield Picture(head + picture("kernels", title, about, "".join(body), HEIGHT), f"{title}: {about}", table)
    yield Prose("Measured on this machine when the report was made, on the inputs of the artifact's self-test.")
