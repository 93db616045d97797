"""Options that every command takes, wherever they stand on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bitlower.tools.stdout import results_alone

if TYPE_CHECKING:
    from bitlower.tools.render import Display

FLAGS = ("--json", "--quiet", "-q", "--debug", "--no-verify", "--print-after-change")
VALUES = ("--plugin",)


@dataclass(frozen=True)
class Settings:
    """The options that every command takes."""

    machine: bool = False
    quiet: bool = False
    verify: bool = True
    print_after_change: bool = False
    plugins: tuple[Path, ...] = ()

    def display(self) -> Display:
        """Where output goes."""
        from bitlower.tools.render import Display

        return Display(self.machine, self.quiet)


def hoist(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options of every command moved to the front, where the parser wants them.

    >>> hoist(["run", "recipe.yaml", "--json", "-o", "out"])
    ['--json', 'run', 'recipe.yaml', '-o', 'out']
    """
    front: list[str] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            rest += [argument, *pending]
        elif argument in FLAGS or argument.startswith(tuple(f"{name}=" for name in VALUES)):
            front.append(argument)
        elif argument in VALUES:
            front += [argument, *(value for value in [next(pending, None)] if value is not None)]
        else:
            rest.append(argument)
    return front + rest


def settings_of(context: typer.Context) -> Settings:
    """The settings of this call, with standard output kept for the result; plugins are loaded here and not before.

    Raises:
        BitlowerError: a plugin cannot be loaded.
    """
    root = context.find_root()
    settings = root.obj
    assert isinstance(settings, Settings)
    root.with_resource(results_alone())
    if settings.plugins:
        from bitlower.passes import load_plugin

        for path in settings.plugins:
            load_plugin(path)
    return settings
