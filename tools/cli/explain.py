"""The command ``explain``: why a tensor has its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitlower.tools.cli.settings import settings_of


def explain(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's folder.")],
    tensor: Annotated[
        str, typer.Argument(metavar="[TENSOR]", help="A tensor or a module, or a glob of them; all if not given.")
    ] = "",
) -> None:
    """Say why a tensor has its bits, or stays float, and what it costs to change that."""
    settings = settings_of(context)
    from bitlower.tools.explain import explain as explained
    from bitlower.tools.render import make_table

    rows = explained(folder, tensor)
    form = {"artifact": str(folder), "tensors": [row.to_dict() for row in rows]}
    if tensor:
        settings.display().result(form, *(row.text() for row in rows))
        return
    cells = [(row.tensor, row.role, row.path, row.spec or "float", row.reasons[0]) for row in rows]
    table = make_table(f"{len(rows)} tensors of {folder}", ("tensor", "role", "module", "bits", "why"), cells)
    settings.display().result(form, table)
