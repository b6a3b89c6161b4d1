"""Weights of public networks that measure images: found, downloaded, checked, read."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.checkpoints.published import PICKLE_MAGIC, ZIP_MAGIC, load_pickle
from llamagen.support.errors import InputError, one_line
from llamagen.support.weights import check_shapes, read_safetensors

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CHUNK = 2**20
_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file on the web."""

    name: str
    """Its name in the cache."""
    url: str
    sha256: str | None
    """Of its content; None if that is not known."""


def writable_cache(purpose: str) -> Path:
    """Return the folder of downloads; an InputError that it cannot be written names ``purpose``."""
    try:
        return storage.require_writable(storage.cache_folder())
    except InputError as error:
        raise InputError(f"{error} for {purpose} (LLAMAGEN_CACHE)") from error


def cached(file: PublicFile, *, purpose: str, remedy: str) -> Path:
    """Return the file in the cache, downloaded if it is not there.

    Several processes at once each download for themselves, so let one of them go first. InputError,
    which names the purpose of the file and a remedy, if the download failed, or the cache holds
    another file under this name.
    """
    path = storage.cache_folder() / file.name
    if path.is_file():
        require_checksum(path, file.sha256, remedy="without that file it is downloaded again")
        return path
    writable_cache(purpose)
    with storage.atomic_file(path) as temporary:
        download(file, temporary, purpose=purpose, remedy=remedy)
    return path


def download(file: PublicFile, path: Path, *, purpose: str, remedy: str) -> None:
    """Download a file to ``path``, which is of no use if this raises; see ``cached``."""
    found = hashlib.sha256()
    with path.open("wb") as out:
        for part in _fetch(file, purpose, remedy):
            found.update(part)
            out.write(part)
    if file.sha256 not in (None, found.hexdigest()):
        raise InputError(
            f"{file.url} gave another file than expected (SHA-256 {found.hexdigest()}, not "
            f"{file.sha256}), which was deleted; try again, or {remedy}"
        )


def _fetch(file: PublicFile, purpose: str, remedy: str) -> Iterator[bytes]:
    """The content of a file on the web, in parts, with a progress bar on a terminal."""
    title = f"downloading {file.name}"
    # Only errors of the network are caught here: a full disk stays the OSError that it is.
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:  # noqa: S310
            size = response.length
            with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=None) as bar:
                while part := response.read(_CHUNK):
                    bar.update(len(part))
                    yield part
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException) as error:
        reason = one_line(getattr(error, "reason", error)) or type(error).__name__
        raise InputError(
            f"cannot download {file.url} for {purpose} ({reason}); {remedy}"
        ) from error


def require_checksum(path: Path, sha256: str | None, *, remedy: str) -> None:
    """Raise InputError if a file's content is not the expected one; None expects nothing."""
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} is damaged or another file than its name says (SHA-256 {found}, not "
            f"{sha256}); {remedy}"
        )


def read(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a .pth or .safetensors file by name, on the CPU.

    InputError if it is damaged, holds something else, or asks to run code.
    """
    with path.open("rb") as file:
        start = file.read(len(ZIP_MAGIC))
    if not start.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        return {name: read() for name, read in read_safetensors(path)}
    content = load_pickle(path, mapped=start == ZIP_MAGIC)
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise InputError(f"{path} holds a {found}, expected a dictionary of weights")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def build(
    make: Callable[[], ModuleT], tensors: Mapping[str, Tensor], *, source: str, kind: str
) -> ModuleT:
    """Return a network with existing weights, its whole state, as float32 on the CPU.

    ``make`` builds it on the device "meta": buffers outside its state need a device of their own.
    InputError, with ``source`` of the weights and ``kind`` of network, if names or shapes are not
    the network's, or weights are not finite.
    """
    # Without memory and initial values, which would also advance the caller's random state.
    with torch.device("meta"):
        model = make()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(expected, found, source=source, kind=kind)
    own = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise InputError(
                f"{source}: weight {name} ({tensor.dtype}) does not hold finite floating-point "
                f"numbers; copy or download it again"
            )
        # A copy that does not depend on the file, in the layout of convolutions.
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        own[name] = tensor.to(torch.float32, copy=True, memory_format=layout)
    # Checked above; normalisations would miss their counters of the training.
    model.load_state_dict(own, strict=False, assign=True)
    return model
