"""What transformers loads from the files beside a model: tokenizers, image processors, feature extractors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bitlower.ir import BitlowerError, shorten
from bitlower.ir.scratch import scratch_folder


@contextmanager
def loading(what: str, owner: str, hint: str = "") -> Iterator[None]:
    """Whatever transformers and its libraries raise on damaged files, as an error that names what and whose it is."""
    try:
        yield
    except BitlowerError:  # no room for the files
        raise
    except Exception as error:
        why = shorten(" ".join(str(error).split()))
        raise BitlowerError(f"the {what} of {owner} cannot be loaded: {why}", hint=hint) from None


@contextmanager
def unpacked(files: Iterable[tuple[str, bytes]], config: str) -> Iterator[Path]:
    """A folder with these files, by name, and the model's configuration as JSON; it is gone afterwards.

    Raises:
        BitlowerError: there is no room for the files.
    """
    with scratch_folder() as folder:
        for name, data in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / "config.json").write_text(config)
        yield folder
