"""The command ``push``: an artifact to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitlower.tools.cli.settings import settings_of


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command to ``app``."""
    app.command("push", epilog=epilog)(push)


def push(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's folder.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that others do not see.")] = False,
    revision: Annotated[str, typer.Option(help="A branch; made if there is none.")] = "main",
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Check an artifact against its manifest, and upload it to the Hugging Face hub in one commit."""
    display = settings_of(context).display()
    from bitlower.tools.publish import push as upload
    from bitlower.tools.render import format_bytes

    done = upload(folder, repository, private=private, revision=revision, message=message, note=display.note)
    display.text(done.to_dict(), f"{done.url}: {done.files} files, {format_bytes(done.bytes)}")
