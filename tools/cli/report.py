"""The command ``report``: one HTML file about an artifact, or about two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitlower.tools.cli.settings import settings_of


def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[DIR2]", help="Another one, to compare it with.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The HTML file; DIR.html beside the folder if not given.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Run the artifact in its runtime, and show what its kernels take here.")
    ] = False,
) -> None:
    """Write one HTML file that shows what an artifact is, what it cost and why; it loads nothing from anywhere."""
    settings = settings_of(context)
    from bitlower.tools.render import format_bytes
    from bitlower.tools.report.page import report as write

    target = write(folder, other, output=output, profile=profile)
    size = target.stat().st_size
    settings.display().text({"report": str(target), "bytes": size}, f"wrote {target} ({format_bytes(size)})")
