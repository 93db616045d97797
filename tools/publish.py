"""Artifacts on the Hugging Face hub: checked against their manifest, then uploaded in one commit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from bitlower.backends.artifact import MANIFEST, check_artifact, is_artifact, read_manifest
from bitlower.ir import BitlowerError
from bitlower.ir.files import check_name

_HUBS_OWN = (".gitattributes",)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: the repository and its revision, the commit, and how many files and bytes it holds."""

    repository: str
    revision: str
    commit: str
    url: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Upload the artifact in ``folder``, and nothing else that lies there.

    Args:
        folder: an artifact's; each file is as its manifest says.
        repository: on the hub, ``ORG/NAME``; it is made if there is none.
        private: of one that is made.
        revision: a branch; it is made if there is none.
        message: of the commit.
        note: is told what goes on.

    Raises:
        BitlowerError: no artifact, no such place, nobody is logged in, the hub cannot be reached, or there are files
            at that revision that the artifact has not.
        CheckError: a file of the artifact is missing or changed; nothing is uploaded.
    """
    path = check_name(folder)
    if not is_artifact(path):
        raise BitlowerError(f"{path} is no artifact", hint="give the folder that a run wrote")
    files = check_artifact(path)
    if files.unlisted:
        note(f"not the artifact's, and not uploaded: {', '.join(files.unlisted)}")
    names = [*sorted(read_manifest(path).files), MANIFEST]
    with _explained(repository):
        api = HfApi(library_name="bitlower")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        others = {*api.list_repo_files(repository, revision=revision)} - {*names, *_HUBS_OWN}
        if others:
            raise BitlowerError(
                f"{repository} at {revision} holds {', '.join(sorted(others))}, which the artifact has not",
                hint="delete them there, or push to another --revision",
            )
        disable_progress_bars()
        note(f"uploading {files.count + 1} files to {repository}")
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, path / name) for name in names],
            commit_message=message or f"{path.resolve().name}, by bitlower",
            revision=revision,
        )
    count = files.bytes + (path / MANIFEST).stat().st_size
    return Pushed(repository, revision, commit.oid, commit.commit_url, len(names), count)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """What the hub and its client raise, as one clear error.

    Raises:
        BitlowerError: it failed.
    """
    try:
        yield
    except HFValidationError:
        raise BitlowerError(f"{repository!r} is no name of a repository", hint="it is ORG/NAME") from None
    except LocalTokenNotFoundError:
        raise BitlowerError("nobody is logged in to the hub", hint=_LOGIN) from None
    except OfflineModeIsEnabled:
        raise BitlowerError("the hub is not reached, as HF_HUB_OFFLINE asks", hint="unset HF_HUB_OFFLINE") from None
    except RepositoryNotFoundError as error:
        raise BitlowerError(f"{repository} cannot be written: {_first(error)}", hint=_LOGIN) from None
    except HfHubHTTPError as error:
        denied = error.response is not None and error.response.status_code in (401, 403)
        hint = _LOGIN if denied else "see what the hub says of it"
        raise BitlowerError(f"{repository} cannot be written: {_first(error)}", hint=hint) from None
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("http")):  # the client's transport
            raise
        raise BitlowerError(f"the hub cannot be reached: {_first(error)}", hint="is there a network?") from None


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
