"""Names and errors of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llamagen.support.errors import InputError, one_line


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be the name of a hub repository of somebody: "owner/name"."""
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return text.count("/") == 1


# huggingface_hub changed its HTTP library with version 1; its own errors derive from either.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]


@contextmanager
def hub_errors(repo: str, file: str | None = None) -> Iterator[None]:
    """Turn errors of a download from ``repo`` into an InputError of one line, with a remedy.

    Faults of this machine, such as a full disk, stay the OSError that they are.
    """
    hub, wanted = constants.ENDPOINT, repo if file is None else f"{file} of {repo}"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set; unset it, or download it first"
    else:
        reason = f"{hub} did not answer as a hub does; check the network, a proxy and HF_ENDPOINT"
    missing = f"{wanted} is not on this machine, neither as a file nor as a download, and {reason}"
    # The first that fits: some derive from others.
    messages: dict[type[Exception], str] = {
        errors.GatedRepoError: f"the hub gives {repo} only to those who accept its terms: do so at "
        f"{hub}/{repo}, and log in with `hf auth login`",
        errors.RepositoryNotFoundError: f"there is no repository {repo} on the hub ({hub}), and no "
        f"such folder here; check the name, and log in with `hf auth login` if it is private",
        errors.RevisionNotFoundError: f"{repo} on the hub has no such revision; check its name",
        errors.LocalEntryNotFoundError: missing,
        errors.OfflineModeIsEnabled: missing,
        errors.EntryNotFoundError: f"the hub does not have {wanted}; it may have been renamed "
        f"there",
    }
    try:
        yield
    except (_HTTP_ERROR, errors.EntryNotFoundError, OSError) as error:
        for kind, message in messages.items():
            if isinstance(error, kind):
                raise InputError(message) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"the download of {wanted} from {hub} failed ({reason}); try again"
        ) from error
