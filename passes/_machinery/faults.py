"""Passes that fail, ours and those of others: what is raised for an error that came out of one."""

from __future__ import annotations

from bitlower.ir import BitlowerError
from bitlower.ir.plugins.faults import EXIT_CODES, describe_error, source_of
from bitlower.passes._machinery.base import Pass


def is_own(pass_: Pass) -> bool:
    """Whether the pass is one of bitlower's."""
    return type(pass_).__module__.startswith("bitlower.")


def blame_pass(pass_: Pass, error: BaseException) -> BaseException:
    """What to raise for ``error``, which came out of ``pass_`` or out of what its class defines.

    The user's interruption, and faults of bitlower's own passes, stay as they are; a refusal of a third party's pass
    names the pass; all else becomes one line with the line of the pass's source.
    """
    own = is_own(pass_)
    if isinstance(error, KeyboardInterrupt) or (own and isinstance(error, Exception)):
        return error
    name = pass_name(pass_)
    if isinstance(error, BitlowerError) and error.exit_code in EXIT_CODES:
        if repr(name) not in str(error):
            named = BitlowerError(f"pass {name!r}: {error.message}", hint=error.hint)
            error.message, error.args = named.message, named.args
        return error
    return BitlowerError(f"pass {name!r} failed: {describe_error(error, source_of(type(pass_)))}")


def pass_name(pass_: Pass) -> str:
    """The name of a pass, or that of its class where it has lost its own."""
    return pass_.name if isinstance(pass_.name, str) and pass_.name else type(pass_).__name__
