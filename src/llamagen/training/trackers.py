"""Destinations of a run's metrics and pictures besides its folder: TensorBoard, wandb."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import llamagen.support.storage as storage
from llamagen.support.errors import InputError

TENSORBOARD_FOLDER = "tensorboard"
"""TensorBoard's files, in the run's folder."""

_WANDB_ID_NAME = "wandb-id.txt"


class Tracker(abc.ABC):
    """A destination of what a run logs."""

    @abc.abstractmethod
    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log the metrics of a split (train or validation)."""

    def picture(self, step: int, name: str, path: Path) -> None:  # noqa: B027
        """Log a PNG file."""

    def close(self) -> None:  # noqa: B027
        """Flush and close."""


def open_trackers(names: Sequence[str], out: Path, about: Mapping[str, Any]) -> list[Tracker]:
    """Return the trackers called ``names``, for the run in ``out``.

    Args:
        names: "tensorboard", "wandb".
        out: the run's folder.
        about: the recipe, as plain values.

    Raises:
        InputError: the package of one is not installed.
    """
    kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    return [kinds[name](out, about) for name in names]


class _TensorBoard(Tracker):
    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise InputError(
                "tracker tensorboard needs a package that is not installed; "
                "pip install 'llamagen[train]'"
            ) from error
        del about
        self._writer = SummaryWriter(str(out / TENSORBOARD_FOLDER))

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb(Tracker):
    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "tracker wandb needs a package that is not installed; pip install wandb"
            ) from error
        self._wandb = wandb
        # A run that continues has one identity there too.
        id_path = out / _WANDB_ID_NAME
        if not id_path.exists():
            storage.write_text(id_path, wandb.util.generate_id() + "\n")
        self._run = wandb.init(
            project="llamagen",
            name=out.name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(out),
            config=dict(about),
        )

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        # Not wandb's own step, which may not decrease: a resumed run repeats some.
        self._run.log({"step": step, **{f"{split}/{name}": v for name, v in values.items()}})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()
