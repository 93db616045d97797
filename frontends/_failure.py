"""What tracing raises, in one line: the model, the place in it, the cause, and what can be done."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bitlower.ir import BitlowerError

PYTHON_ROOTS = tuple(str(Path(p).resolve()) for p in torch.__path__)
_LONGEST = 300
"""Characters of another library's error that are passed on."""
_DATA_DEPENDENT = ("data-dependent", "data dependent")
_ADVICE = re.compile(
    r"(For more information|For extended logs|For more debugging|Suggested fixes|consider using).*", re.S
)


@contextmanager
def explain_failure(model: str) -> Iterator[None]:
    """Turn whatever tracing raises into one error that names the model's own line; torch's own reports are kept back.

    Raises:
        BitlowerError: with model, line, cause and, where one is known, a fix.
    """
    try:
        with _silent():
            yield
    except BitlowerError:
        raise
    except RecursionError as error:
        raise BitlowerError(f"{model} cannot be traced: its modules call each other without end") from error
    except Exception as error:
        line = _model_line(error)
        cause, hint = _cause(error)
        raise BitlowerError(f"{model} cannot be traced{f' at {line}' if line else ''}: {cause}", hint=hint) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what torch logs, warns and prints about an export that fails (the whole graph so far) off the terminal."""
    threshold = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(threshold)


def _cause(error: Exception) -> tuple[str, str]:
    """The reason in a few words, and what can be done about it."""
    text = str(error)
    if any(words in text for words in _DATA_DEPENDENT):
        return (
            "what it computes there depends on the values of its inputs, which a trace cannot follow",
            "choose with `torch.where` instead of `if`, or a configuration of the model without that branch",
        )
    lines = [line.strip() for line in _ADVICE.sub("", text).splitlines()]
    reason = next((line for line in lines if line), type(error).__name__)
    return (reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}…"), ""


def _model_line(error: BaseException) -> str:
    """``file.py:line: code`` of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        foreign = frame.filename.startswith(PYTHON_ROOTS) or "/transformers/exporters/" in frame.filename
        if not foreign and Path(frame.filename).resolve().parent != Path(__file__).resolve().parent:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line or ''}".rstrip(": ")
    return ""
