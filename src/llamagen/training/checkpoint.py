"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step-0001000`` that appears whole or not at all. No random generator is
in it, since no step uses numbers that earlier steps left behind (see ``loop``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import llamagen.storage as storage

FOLDER_NAME = "checkpoints"

_STATE_NAME = "state.pt"
_ABOUT_NAME = "about.json"
_PREFIX = "step-"
_DAMAGED_SUFFIX = ".damaged"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint, read."""

    step: int
    """Finished steps."""
    state: dict[str, Any]
    """Weights, optimiser and whatever else the loop keeps, on the CPU."""
    about: dict[str, Any]
    """What the run is: program version and identity of the data."""


def save_checkpoint(
    folder: Path, *, step: int, state: dict[str, Any], about: dict[str, Any], keep: int
) -> Path:
    """Writes a checkpoint into ``folder`` and removes all but the ``keep`` latest.

    If writing fails, the earlier checkpoints are as they were.
    """
    path = folder / f"{_PREFIX}{step:07d}"
    with storage.atomic_folder(path) as temporary:
        # Through a Python file: torch's own writer does not tell a full disk from other faults.
        with (temporary / _STATE_NAME).open("wb") as file:
            torch.save(state, file)
        about = {"step": step, "llamagen": version("llamagen"), "torch": torch.__version__, **about}
        storage.write_json(temporary / _ABOUT_NAME, about)
    for old in _find(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest checkpoint that is whole, or None.

    Damaged ones are reported, renamed and passed over. What an interrupted save left behind is
    removed.
    """
    for leftover in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover)
    for path in reversed(_find(folder)):
        try:
            return _read(path)
        except (OSError, RuntimeError, ValueError, LookupError, EOFError, zipfile.error) as error:
            reason = " ".join(str(error).split())
            _log.warning("checkpoint %s is damaged and passed over (%s)", path, reason)
            # Out of the way: it must not count among the latest that are kept.
            path.rename(path.with_name(path.name + _DAMAGED_SUFFIX))
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_find(folder))


def _find(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _read(path: Path) -> Checkpoint:
    about = json.loads((path / _ABOUT_NAME).read_text(encoding="utf-8"))
    state_path = path / _STATE_NAME
    with zipfile.ZipFile(state_path) as archive:
        # torch reads flipped bits without complaint; the archive has a checksum of each tensor.
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged} in {_STATE_NAME}")
    try:
        state = torch.load(state_path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message explains how to run what is in the file.
        raise ValueError(f"{_STATE_NAME} holds more than tensors and plain values") from error
    return Checkpoint(step=int(about["step"]), state=state, about=about)
