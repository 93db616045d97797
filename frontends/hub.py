"""Models of the Hugging Face hub: ``hf:ORG/NAME@REVISION``, downloaded once into the hub's own cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bitlower.ir import BitlowerError

PREFIX = "hf:"
OTHER_WEIGHTS = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.gguf", "*.onnx", "*.onnx_data",
    "*.onnx.data", "*.mlmodel", "*.mlpackage/*", "*.xml", "*.engine", "*.pkl", "*.npz",
)  # fmt: skip
"""Files of the hub that are not downloaded: weights in formats other than safetensors."""
WEIGHTS = "*.safetensors"
"""Files that are not downloaded where only the configuration is asked for."""


def is_hub_name(model: str) -> bool:
    """Whether ``model`` names a repository of the hub."""
    return model.startswith(PREFIX)


def hub_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of ``hf:ORG/NAME[@REVISION]`` in the hub's cache, downloaded if it is not there.

    The environment says where (``HF_HOME``), from where (``HF_ENDPOINT``), with what token (``HF_TOKEN``), and whether
    the cache alone is asked (``HF_HUB_OFFLINE``).

    Args:
        name: a revision is a branch, a tag or a commit; the main branch if it is left out.
        weights: whether the weights have to be there too.

    Raises:
        BitlowerError: no such repository or revision, no access, or it is neither reached nor in the cache.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not repository or ("@" in name and not revision):
        raise BitlowerError(f"{name!r} names no model of the hub", hint="write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return _download(repository, revision or None, weights)


def pinned(name: str) -> str:
    """``name`` with the commit that its revision stands for, as it was resolved.

    Raises:
        BitlowerError: as :func:`hub_folder`.
    """
    commit = hub_folder(name).name
    return f"{PREFIX}{name.removeprefix(PREFIX).partition('@')[0]}@{commit}"


@cache
def _download(repository: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    where = f"{repository} at {revision}" if revision else repository
    ignored = [*OTHER_WEIGHTS] if weights else [*OTHER_WEIGHTS, WEIGHTS]
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=ignored))
    except errors.GatedRepoError:
        problem, hint = f"{where} is gated", "ask for access on its page, and log in: hf auth login, or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem, hint = f"the hub has no model {repository}", "look at its name; a private one takes HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem, hint = f"{repository} has no revision {revision!r}", "give a branch, a tag or a commit"
    except errors.HFValidationError as error:
        problem, hint = f"{where} is no name of the hub: {_line(error)}", "write hf:ORG/NAME or hf:ORG/NAME@REVISION"
    except errors.LocalEntryNotFoundError:
        problem = f"{where} is not in the cache, and the hub is not reached"
        hint = "look at the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder"
    except (errors.HfHubHTTPError, OSError) as error:
        problem, hint = f"{where} cannot be downloaded: {_line(error)}", "run the same command again"
    raise BitlowerError(problem, hint=hint) from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
