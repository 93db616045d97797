"""Artifacts as input: nothing of one is loaded before its files are known to be those that were written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitlower.backends.base import Model
from bitlower.backends.onnx_qdq import MODEL, OnnxModel
from bitlower.backends.registry import answering, writer_of
from bitlower.ir import BitlowerError, CheckError


def load_artifact(folder: Path) -> Model | None:
    """The artifact, or another ONNX model, in ``folder``; None where transformers reads it.

    Raises:
        BitlowerError: it is not as it was written, or does not run here.
    """
    with as_input():
        writer = writer_of(folder)
        if writer is not None:
            with answering(writer):
                return writer.load(folder)
    return OnnxModel.open(folder) if (folder / MODEL).is_file() else None


@contextmanager
def as_input() -> Iterator[None]:
    """Turn a failed check of an artifact that was given to be run into bad input, which it is.

    Raises:
        BitlowerError: in place of a CheckError.
    """
    try:
        yield
    except CheckError as error:
        raise BitlowerError(error.message, hint=error.hint) from None
