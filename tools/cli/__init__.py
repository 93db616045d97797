"""The command ``bitlower``, from its first line on.

Exit codes: 0 done, 1 a check failed (or a fault in bitlower itself), 2 bad input, 128 and the signal's number where one
ended the run: 129 hung up, 130 interrupted, 143 terminated. Nothing but Python's own modules is imported before the
signals are looked after: importing the others takes seconds, and they do not all survive an interruption.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from bitlower.tools.cli.signals import Signals


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on ``args`` (those of the process if None) and return the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    with Signals() as signals:
        try:
            from bitlower.tools.cli.app import fail, run

            try:
                return run(arguments)
            except BaseException as error:
                if signals.word:
                    raise
                return fail(error, arguments)
        except BaseException:
            if not signals.word:
                raise
    if "--json" in arguments:
        print(f'{{"error": "{signals.word}", "exit_code": {signals.exit_code}}}')
    print(f"error: {signals.word}", file=sys.stderr)
    return signals.exit_code


def command() -> None:
    """Run the command line as a process; a thread that a plugin left behind does not keep it from ending."""
    code = main()
    if any(t.is_alive() and not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
