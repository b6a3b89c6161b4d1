"""Checkpoints: all that a run needs to resume exactly.

A checkpoint is a folder ``step-0001000`` that appears whole or not at all. Its tensors are in the
format of PyTorch's Distributed Checkpoint (DCP), written by all processes, and any number of
processes can read them. Random generators need no state: each step seeds its own (see ``loop``).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pickle
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

import llamagen.support.storage as storage
from llamagen.support import distributed
from llamagen.support.errors import InputError, one_line

CHECKPOINTS_NAME = "checkpoints"
_TENSORS_NAME = "tensors"
_STATE_NAME = "state.pt"
_ABOUT_NAME = "about.json"
_PREFIX = "step-"
_BLOCK = 1 << 24
_GRACE = 120.0
"""Seconds that a run which ends early waits for its last checkpoint."""

_log = logging.getLogger(__name__)

# Expected in a run of one process. Permanent: filters are shared with the threads that write.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

NestedTensors = Mapping[str, Mapping[str, Tensor]]
"""Groups of named tensors, some perhaps sharded (``DTensor``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    """Finished steps."""
    about: dict[str, Any]
    """Description of the run: program version, model, identity of the data."""

    def read_state(self) -> dict[str, Any]:
        """Return the plain values and small tensors that were saved."""
        return torch.load(self.path / _STATE_NAME, map_location="cpu", weights_only=True)

    def read_tensors(self, tensors: NestedTensors) -> None:
        """Fill ``tensors`` in place, each process its shards; InputError if it has others."""
        with _errors_of_dcp():
            load(dict(tensors), storage_reader=_Reader(self.path / _TENSORS_NAME))


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the latest checkpoint that is not damaged, or None; all processes call it.

    Damaged ones are reported and renamed. Leftovers of an interrupted save are removed.
    """
    # Only the main process looks, since it renames what is damaged.
    return distributed.gathered(_latest(folder) if distributed.is_main() else None)[0]


def read_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Return the checkpoint of a step, by default the latest, or raise InputError."""
    paths = find_checkpoints(folder)
    if not paths:
        raise InputError(f"there are no checkpoints in {folder}; name the folder of a run")
    if step is not None and step not in paths:
        known = ", ".join(map(str, paths))
        raise InputError(f"there is no checkpoint of step {step} in {folder}; there is {known}")
    path = paths[max(paths) if step is None else step]
    try:
        return _verified(path)
    except _DAMAGE as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); choose another step") from error


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by their steps, in order, the damaged ones as well."""
    paths = {path.name.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*")}
    return dict(sorted((int(step), path) for step, path in paths.items() if step.isdecimal()))


class CheckpointWriter:
    """Background writer of a run's checkpoints."""

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0) -> None:
        """Keep the latest ``keep`` checkpoints and those of multiples of ``keep_every`` steps."""
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._saving: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        # Its own group: the threads that write communicate while the training does.
        self._group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def save(
        self, *, step: int, tensors: NestedTensors, state: dict[str, Any], about: dict[str, Any]
    ) -> None:
        """Copy everything after ``step`` steps and begin to write it; all processes call it.

        ``tensors`` may change as soon as this returns. ``state`` has plain values and small
        tensors, of which the main process's are written, ``about`` plain values that describe the
        run. Waits for the previous checkpoint. Raises OSError if that could not be written, or
        this one cannot be begun; the earlier ones are intact.
        """
        self.wait()
        path = self._folder / f"{_PREFIX}{step:07d}"
        temporary = self._begin(path, state)
        with _errors_of_dcp():
            writing = async_save(
                dict(tensors),
                storage_writer=FileSystemWriter(temporary / _TENSORS_NAME),
                process_group=self._group,
            )
        assert isinstance(writing, Future)
        self._saving = writing
        if distributed.is_main():
            versions = {"llamagen": version("llamagen"), "torch": torch.__version__}
            about = {"step": step, **versions, "processes": distributed.world_size(), **about}
            self._saving = self._thread.submit(self._finish, writing, temporary, path, about)

    def wait(self) -> None:
        """Wait until all is written, or raise OSError; all processes call it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            self._raise_together(_cause(saving.exception()))

    def check(self) -> None:
        """Raise as ``wait`` does if writing has failed already, without waiting."""
        if self._saving is not None and all(distributed.gathered(self._saving.done())):
            self.wait()

    def close(self) -> None:
        """Let the checkpoint that is being written be finished when a run ends early."""
        # Without communication: a lost process may be what ended the run.
        if self._saving is not None and distributed.is_main():
            wait([self._saving], timeout=_GRACE)

    def _begin(self, path: Path, state: dict[str, Any]) -> Path:
        """Make the temporary folder, with the state in it; return its path in every process."""
        error, name = None, ""
        if distributed.is_main():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
                Path(name, _TENSORS_NAME).mkdir()
                # Through a Python file: torch's own writer does not tell a full disk from others.
                with Path(name, _STATE_NAME).open("wb") as file:
                    torch.save(state, file)
            except OSError as caught:
                shutil.rmtree(name, ignore_errors=True)
                error = caught
        self._raise_together(error)
        return Path(distributed.gathered(name)[0])

    def _finish(
        self, writing: Future[Any], temporary: Path, path: Path, about: dict[str, Any]
    ) -> None:
        """Turn a written folder into the checkpoint; a thread of the main process runs it."""
        try:
            writing.result()
            with storage.atomic_folder(path) as last:
                for part in list(temporary.iterdir()):
                    part.rename(last / part.name)
                storage.write_json(last / _ABOUT_NAME, {**about, "files": _checksums(last)})
            for step, old in list(find_checkpoints(self._folder).items())[: -self._keep]:
                if self._keep_every == 0 or step % self._keep_every:
                    shutil.rmtree(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _raise_together(self, own: BaseException | None) -> None:
        """Raise in every process if there is an error in one."""
        reasons = distributed.gathered(None if own is None else one_line(own))
        if own is not None:
            raise own
        for number, reason in enumerate(reasons):
            if reason is not None:
                raise OSError(f"process {number} could not save a checkpoint ({reason})")


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the first error of any process behind one of DCP's; others as they are."""
    if isinstance(error, CheckpointException):
        return next((fault for fault, _ in error.failures.values()), error)
    return error


class _errors_of_dcp:  # noqa: N801
    """Context that raises the cause of DCP's errors; a generator would lose the traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CheckpointException):
            cause = _cause(error)
            if isinstance(cause, OSError | InputError):
                raise cause from error
            raise InputError(
                f"the checkpoint does not fit this run ({one_line(cause)}); give another `out`"
            ) from error


class _Reader(FileSystemReader):
    """DCP's reader, with an unpickler of the index that runs no code in it."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that is limited to the classes of DCP's index."""

    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
            ("collections", "OrderedDict"),
            *itertools.product(("pathlib", "pathlib._local"), ("Path", "PosixPath", "WindowsPath")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_index = module == "torch.distributed.checkpoint.metadata" and "." not in name
        if is_dtype or is_index or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which is no part of one")


_DAMAGE = (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError)


def _latest(folder: Path) -> Checkpoint | None:
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover)
    for path in reversed(find_checkpoints(folder).values()):
        try:
            return _verified(path)
        except _DAMAGE as error:
            _log.warning("checkpoint %s is damaged and passed over (%s)", path, one_line(error))
            # So that it does not count among the latest that are kept.
            path.rename(f"{path}.damaged")
    return None


def _verified(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path`` after checking all checksums."""
    about = json.loads((path / _ABOUT_NAME).read_text(encoding="utf-8"))
    for name, checksum in about["files"].items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if _checksum(path / name) != checksum:
            raise ValueError(f"wrong checksum of {name}")
    checkpoint = Checkpoint(path=path, step=int(about["step"]), about=about)
    try:
        checkpoint.read_state()
    except pickle.UnpicklingError as error:
        # torch's own message explains how to run what is in the file.
        raise ValueError(f"{_STATE_NAME} holds more than tensors and plain values") from error
    _Reader(path / _TENSORS_NAME).read_metadata()
    return checkpoint


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    """Return the CRC-32 of a file: torch does not notice flipped bits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
