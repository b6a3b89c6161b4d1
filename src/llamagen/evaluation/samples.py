"""Images generated for an evaluation: resumable, and shared by processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

import llamagen.support.storage as storage
from llamagen.checkpoints.names import find_public
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.evaluation.image_sets import PiecedImages, Pieces, as_arrays, size_text
from llamagen.generation import Progress
from llamagen.pipeline import Pipeline
from llamagen.support.artifact import Advance

_FIRST_SETTINGS = ("guidance_scale", "guidance_stop", "temperature", "top_k", "top_p")

SIZE = 256
"""Side in pixels at which images of published models are compared."""
PUBLISHED = (
    ("B", 16, 2.0, 5.46),
    ("B", 24, 2.0, 6.09),
    ("L", 16, 2.0, 3.80),
    ("L", 24, 2.0, 3.07),
    ("XL", 24, 1.75, 2.62),
    ("XXL", 24, 1.75, 2.34),
    ("3B", 24, 1.65, 2.18),
)
"""Model, rows and columns of codes, guidance scale, FID-50k on ImageNet 256x256 against ADM's
training-set statistics (arXiv 2406.06525). Images of 24x24 codes are resized from 384 to 256."""
_GUIDANCE = {f"c2i-{name}-{16 * grid}".lower(): scale for name, grid, scale, _ in PUBLISHED}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """All that decides images, but the model."""

    prompts: tuple[str | int, ...]
    """Index of a class, or a text, per image."""
    order: Literal["balanced", "random"] | None = None
    """Of classes; for reports."""
    seed: int = 0
    """Image i has this + i."""
    size: int | None = None
    """Side in pixels that images are resized to (bicubic, before the step to 8 bits); None leaves
    them at the model's size."""
    sampling: SamplingConfig

    @classmethod
    def of_classes(
        cls,
        pipeline: Pipeline,
        count: int,
        *,
        order: Literal["balanced", "random"] = "balanced",
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Plan images of all classes in random order, which the Inception Score's splits need.

        The order "balanced" has all classes equally often, "random" samples each image's class;
        ``seed`` is that of the order, too. ``options`` are those of ``of_prompts``.
        """
        rng = np.random.default_rng(seed)
        classes = pipeline.transformer.config.num_classes
        if order == "balanced":
            labels = rng.permutation(np.arange(count) % classes)
        else:
            labels = rng.integers(classes, size=count)
        plan = cls.of_prompts(pipeline, labels.tolist(), seed=seed, **options)
        return dataclasses.replace(plan, order=order)

    @classmethod
    def of_prompts(
        cls,
        pipeline: Pipeline,
        prompts: Sequence[str | int],
        *,
        seed: int = 0,
        size: int | None = None,
        **settings: Any,
    ) -> Self:
        """Plan one image of each class or text.

        ``settings`` are those of ``SamplingConfig``; the others, and those that are None, are the
        paper's for published models and the model's own for others. For ``size`` see
        ``compared_side``. InputError if a value lies outside its setting's range.
        """
        side = compared_side(pipeline, size)
        guidance = _GUIDANCE.get(pipeline.name.lower())
        base = pipeline.sampling if guidance is None else SamplingConfig(guidance_scale=guidance)
        return cls(
            prompts=tuple(prompts),
            seed=seed,
            size=None if model_size(pipeline) == (side, side) else side,
            sampling=base.replace(**settings),
        )


def model_size(pipeline: Pipeline) -> tuple[int, int]:
    """Return height and width in pixels of a model's images."""
    rows, columns = pipeline.transformer.config.grid
    factor = pipeline.tokenizer.config.downsampling
    return rows * factor, columns * factor


def compared_side(pipeline: Pipeline, size: int | None = None) -> int | None:
    """Return the side in pixels at which images of a model are compared.

    ``size`` if it is given; 256 for the published models, as published; the model's own for
    others. None if the model's images are not square, which are compared as they are.
    """
    if size is not None:
        return size
    if find_public(pipeline.name) is not None:
        return SIZE
    height, width = model_size(pipeline)
    return height if height == width else None


class Samples(PiecedImages):
    """The images of a plan, in a folder."""

    def __init__(
        self, folder: Path, plan: SamplePlan, about: dict[str, Any], late: dict[str, Any]
    ) -> None:
        """Name the folder; ``draw_samples`` fills it. ``late`` as in ``Pieces``."""
        self.folder, self.plan, self.name = folder, plan, str(folder)
        fields = {"prompts": plan.prompts, "seed": plan.seed, "size": plan.size}
        first, self.identity = (
            storage.short_digest([json.dumps(values, sort_keys=True).encode()])
            for values in ([fields, about], [fields, about, *late.items()])
        )
        settings = {**about, "images": len(plan.prompts), "identity": first}
        self.pieces = Pieces(folder, settings, len(plan.prompts), late=late, noun="samples")
        if all(isinstance(prompt, int) for prompt in plan.prompts):
            self.labels = np.array(plan.prompts)

    def about(self, pipeline: Pipeline) -> dict[str, Any]:
        """Return what a report says of images that a pipeline generated."""
        return {
            "images": len(self),
            "size": size_text(self.size),
            "drawn at": size_text(model_size(pipeline)),
            "resizing": "none" if self.plan.size is None else "bicubic, in float, before 8 bits",
            "folder": str(self.folder),
        }


def draw_samples(
    pipeline: Pipeline, plan: SamplePlan, folder: Path, *, batch_size: int | None = None
) -> Samples:
    """Generate the images that are not in a folder yet; called in every process of a run.

    By default as many are generated at once as fit into memory. InputError if the folder is neither
    new nor begun with the same plan and model.
    """
    weights = pipeline.fingerprints()
    about = {
        "model": pipeline.name,
        "weights": [weights.pop("transformer"), weights.pop("tokenizer")],
        # Those of the first edition, and others where they are set: so a folder stays valid when a
        # later version knows more settings.
        "sampling": {
            setting.name: value
            for setting in sampling_settings()
            if (value := getattr(plan.sampling, setting.name)) != setting.default
            or setting.name in _FIRST_SETTINGS
        },
        **pipeline.precision,
    }
    samples = Samples(folder, plan, about, late=weights)

    def draw(items: range, advance: Advance) -> dict[str, Any]:
        def on_row(progress: Progress) -> None:
            if progress.row == progress.rows:
                advance(len(progress.codes))

        output = pipeline(
            plan.prompts[items.start : items.stop],
            seed=range(plan.seed + items.start, plan.seed + items.stop),
            batch_size=batch_size,
            callback=on_row,
            output_type="codes",
            **dataclasses.asdict(plan.sampling),
        )
        parts = [as_arrays(part, plan.size) for part in pipeline.decode_in_parts(output.codes)]
        return {".npz": {"images": np.concatenate(parts)}}

    samples.pieces.compute(draw, "generating")
    return samples
