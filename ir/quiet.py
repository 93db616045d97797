"""Keeping what transformers and the libraries below it print out of our output."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and its notes on tested versions out of our output."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def silent() -> Iterator[None]:
    """As :func:`quiet`, and without the bars that other libraries draw on standard error by themselves."""
    with quiet(), redirect_stderr(io.StringIO()):
        yield
