"""TVM, imported when it is needed: the extra ``tvm``, and the one pairing of its two packages that works."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bitlower.ir import BitlowerError

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""With a newer ``apache-tvm-ffi`` (what pip picks by itself) ``tvm.ir.save_json`` kills the process."""
_INSTALL = "pip install 'bitlower[tvm]'"


def require_tvm() -> Any:
    """The module ``tvm``.

    Raises:
        BitlowerError: a package of the extra is missing, or the two do not go together.
    """
    check_pins()
    import tvm

    return tvm


def check_pins() -> None:
    """See that both packages are installed in the versions that work together; imports neither.

    Raises:
        BitlowerError: one is missing, or has another version.
    """
    for name, wanted in PINS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise BitlowerError(f"low-bit kernels need {name}, which is not installed", hint=_INSTALL) from None
        if installed != wanted:
            pair = " and ".join(f"{package} {pin}" for package, pin in PINS.items())
            raise BitlowerError(
                f"{name} {installed} is installed, but low-bit kernels need {pair}: other pairings crash the process",
                hint=_INSTALL,
            )
