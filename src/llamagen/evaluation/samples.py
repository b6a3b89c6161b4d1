"""Images drawn for an evaluation, in pieces: goes on where it was interrupted, shared by processes.

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

import llamagen.support.storage as storage
from llamagen.evaluation.image_sets import ImageSet
from llamagen.evaluation.pieces import Pieces
from llamagen.generation.memory import sampling_batch_size
from llamagen.models.tokenizer import images_to_uint8
from llamagen.pipeline import Pipeline
from llamagen.support import distributed
from llamagen.support.errors import InputError

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
        self.pieces = Pieces(folder, len(plan))
        if all(isinstance(prompt, int) for prompt in plan.prompts):
            self.labels = np.array(plan.prompts)

    def __len__(self) -> int:
        return len(self.plan)

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``."""
        return self.pieces.rows("images", first, last)


def draw_samples(
    pipeline: Pipeline,
    plan: SamplePlan,
    folder: Path,
    *,
    batch_size: int | None = None,
    **settings: Any,
) -> Samples:
    """Draws the images that are not in the folder yet; to be called in every process of a run.

    Args:
        pipeline: draws them.
        plan: all of them, of all processes.
        folder: new, empty, or begun with the same plan, model and settings.
        batch_size: images drawn at once; by default as many as fit into memory.
        settings: what ``Pipeline.__call__`` takes, as guidance_scale.

    Raises:
        InputError: the folder was begun with something else, or a setting is refused.
        OSError: the disk is full, or the folder cannot be written to.
    """
    about = _describe(pipeline, settings)
    samples = Samples(folder, plan, about)
    with distributed.main_first():
        _begin(folder, samples, about)

    # Batches of our own, though the pipeline has them too, so that each shows as progress.
    step = batch_size or sampling_batch_size(pipeline.transformer, sequences=1 + True)

    def draw(first: int, last: int, advance: Callable[[int], object]) -> dict[str, np.ndarray]:
        parts = []
        for start in range(first, last, step):
            stop = min(last, start + step)
            output = pipeline(
                plan.prompts[start:stop],
                seed=range(plan.seed + start, plan.seed + stop),
                batch_size=step,
                output_type="codes",
                **settings,
            )
            parts.append(_to_pixels(pipeline, output.codes, plan.size))
            advance(stop - start)
        return {"images": np.concatenate(parts)}

    samples.pieces.make(draw, "drawing")
    return samples


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
        **pipeline.precision,
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
