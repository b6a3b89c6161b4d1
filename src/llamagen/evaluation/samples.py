"""Images drawn for an evaluation, in shards: goes on where it was interrupted, shared by processes.

Shapes: B images of H x W pixels, as uint8 (B, H, W, 3).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

import llamagen.storage as storage
from llamagen.errors import InputError
from llamagen.evaluation.image_sets import PIECE, ImageSet
from llamagen.pipeline import Pipeline
from llamagen.tokenizer import images_to_uint8

_SETTINGS_NAME = "settings.json"

LabelOrder = Literal["balanced", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What is drawn: one condition and one seed per image."""

    prompts: tuple[str | int, ...]
    """Index of a class, or a text, per image."""
    seed: int
    """Image i has this + i."""
    size: int | None
    """Side in pixels that images are resized to (bicubic, before the step to 8 bits); None keeps
    them as they are drawn."""

    @classmethod
    def of_classes(
        cls, classes: int, count: int, *, order: LabelOrder, seed: int, size: int | None
    ) -> SamplePlan:
        """Classes in random order: all as often ("balanced"), or each drawn at random ("random").

        The Inception Score needs a random order, since it is computed over splits.
        """
        numbers = np.random.default_rng(seed)
        if order == "balanced":
            labels = numbers.permutation(np.arange(count) % classes)
        else:
            labels = numbers.integers(classes, size=count)
        return cls(prompts=tuple(map(int, labels)), seed=seed, size=size)

    def __len__(self) -> int:
        return len(self.prompts)


class Samples(ImageSet):
    """The drawn images in a folder."""

    def __init__(self, folder: Path, plan: SamplePlan, settings: dict[str, Any]) -> None:
        """Of a folder that ``draw_samples`` has begun."""
        self.folder, self.plan, self.name = folder, plan, str(folder)
        self.identity = _identity(plan, settings)
        if all(isinstance(prompt, int) for prompt in plan.prompts):
            self.labels = np.array(plan.prompts)

    def __len__(self) -> int:
        return len(self.plan)

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``."""
        parts = []
        for number in range(first // PIECE, (last - 1) // PIECE + 1):
            start = number * PIECE
            part = self._shard(number)
            parts.append(part[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def _shard(self, number: int) -> np.ndarray:
        path = _shard_path(self.folder, number)
        expected = min(PIECE, len(self) - number * PIECE)
        try:
            images: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            path.unlink(missing_ok=True)
            raise InputError(f"{path} is damaged ({error}); run the same command again") from error
        if len(images) != expected:
            raise InputError(f"{path} holds {len(images)} images, expected {expected}; remove it")
        return images


def draw_samples(
    pipeline: Pipeline,
    plan: SamplePlan,
    folder: Path,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> Samples:
    """Draws the images that are not in the folder yet.

    Args:
        pipeline: draws them.
        plan: all of them, of all processes.
        folder: new, empty, or begun with the same plan, model and settings.
        batch_size: images drawn at once; by default as many as fit into memory.
        rank: this process draws every ``world_size``-th shard, from this one on.
        world_size: processes that draw into the folder.
        progress: is told how many more images are there.
        settings: what ``Pipeline.__call__`` takes, as guidance_scale.

    Returns:
        The images, whole once every process has returned.

    Raises:
        InputError: the folder was begun with something else, or a setting is refused.
        OSError: the disk is full, or the folder cannot be written to.
    """
    about = _describe(pipeline, settings)
    samples = Samples(folder, plan, about)
    _begin(folder, samples, about)
    for number in range(rank, samples.pieces(), world_size):
        path = _shard_path(folder, number)
        first = number * PIECE
        last = min(len(plan), first + PIECE)
        if not path.is_file():
            _draw_shard(pipeline, plan, first, last, path, batch_size, progress, settings)
        elif progress is not None:
            progress(last - first)
    return samples


def _draw_shard(
    pipeline: Pipeline,
    plan: SamplePlan,
    first: int,
    last: int,
    path: Path,
    batch_size: int | None,
    progress: Callable[[int], object] | None,
    settings: dict[str, Any],
) -> None:
    parts = []
    step = batch_size or PIECE
    for start in range(first, last, step):
        stop = min(last, start + step)
        output = pipeline(
            plan.prompts[start:stop],
            seed=range(plan.seed + start, plan.seed + stop),
            batch_size=batch_size,
            output_type="codes",
            **settings,
        )
        parts.append(_to_pixels(pipeline, output.codes, plan.size))
        if progress is not None:
            progress(stop - start)
    with storage.atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(parts))


def _to_pixels(pipeline: Pipeline, codes: Tensor, size: int | None) -> np.ndarray:
    """Decodes codes (B, rows, columns), and resizes in float as the published evaluation does."""
    parts = []
    for images in pipeline.decode_in_parts(codes):
        images = images.float()
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        parts.append(images_to_uint8(images).movedim(1, -1).cpu().numpy())
    return np.concatenate(parts)


def _describe(pipeline: Pipeline, settings: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in settings.items() if value is not None}
    return {
        "model": pipeline.name,
        "weights": [pipeline.transformer.fingerprint(), pipeline.tokenizer.fingerprint()],
        "sampling": {**dataclasses.asdict(pipeline.sampling), **given},
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }


def _begin(folder: Path, samples: Samples, about: dict[str, Any]) -> None:
    """Writes the settings, or finds the same ones in the folder."""
    storage.require_writable(folder)
    wanted = {**about, "images": len(samples), "identity": samples.identity}
    path = folder / _SETTINGS_NAME
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no samples; give another --out")
        storage.write_json(path, wanted)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise InputError(
            f"the samples in {folder} were begun with other settings ({', '.join(changed)}); "
            f"restore them, or give another --out"
        )


def _identity(plan: SamplePlan, about: dict[str, Any]) -> str:
    text = json.dumps([dataclasses.asdict(plan), about], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"
