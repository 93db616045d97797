"""The command line: its options, its commands, and what it says when one fails.

Results go to standard output, progress and errors to standard error; with ``--json`` standard output holds one JSON
document. What a command needs is imported when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bitlower.tools.cli import info, push
from bitlower.tools.cli import run as running
from bitlower.tools.cli.settings import Settings, hoist

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

INTERRUPTED = 130
"""What shells give for a process that SIGINT ended: 128 + 2."""

app = typer.Typer(
    name="bitlower",
    help="Lower transformer models to few bits: a pipeline of passes, out to verified ONNX.",
    no_args_is_help=True,
    epilog="Begin with: bitlower plan MODEL (what a run would give), then bitlower quantize MODEL --calibration TEXTS. "
    "MODEL is a Hugging Face folder, a GGUF file, package:NAME or hf:ORG/NAME.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
running.register(app)
info.register(app)
push.register(app, running.EPILOG)


def _version(wanted: bool) -> None:
    if wanted:
        from bitlower import __version__

        typer.echo(f"bitlower {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    plugin: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A file with passes of yours; may be repeated.")
    ] = None,
    print_after_change: Annotated[
        bool, typer.Option("--print-after-change", help="Print the program after each pass that changed it.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the program between passes.")] = False,
    machine: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Lower transformer models to few bits: a pipeline of passes, out to verified ONNX.

    The options below may stand before or after the command.
    """
    context.obj = Settings(machine, quiet, not no_verify, print_after_change, tuple(plugin or ()))


def run(args: Sequence[str]) -> int:
    """Run the command line on ``args`` and return the exit code.

    Raises:
        KeyboardInterrupt: the user stopped it.
        BaseException: what a command raised; :func:`fail` says it.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(hoist(args), prog_name="bitlower", standalone_mode=False)
    except typer.Exit as error:
        code = error.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def fail(error: BaseException, arguments: Sequence[str]) -> int:
    """Say what went wrong, in one line unless a traceback is asked for, and return the exit code."""
    machine = "--json" in arguments
    if isinstance(error, SystemExit):  # whoever read standard output has gone
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return _report("interrupted", INTERRUPTED, machine=machine)
    if "--debug" in arguments:
        traceback.print_exception(error)
    if isinstance(error, _USAGE_ERROR):
        message = error.format_message()  # type: ignore[attr-defined]
        return _report(message or "no command was given", 2, machine=machine)
    from bitlower.ir import BitlowerError

    if isinstance(error, BitlowerError):
        return _report(str(error), error.exit_code, machine=machine)
    first = next(iter(str(error).splitlines()), "")
    message = f"unexpected {type(error).__name__}: {first}; run again with --debug for the traceback"
    return _report(message, 1, machine=machine)


def _report(message: str, code: int, *, machine: bool) -> int:
    if machine:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
    print(f"error: {message}", file=sys.stderr)
    return code
