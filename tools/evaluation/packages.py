"""Packages that compute metrics; the extra ``bitlower[eval]`` has them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bitlower.ir import BitlowerError


def metric_package(module: str, name: str) -> Any:
    """The module ``module`` of the package ``name``.

    Raises:
        BitlowerError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise BitlowerError(
            f"this metric needs the package {name}", hint="install it: pip install bitlower[eval]"
        ) from None
