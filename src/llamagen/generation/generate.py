"""``generate_codes``: the layer below the pipeline, for batches given as tensors.

Shapes: B images, C condition length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llamagen.backends import StepTimes
from llamagen.config import Grid, SamplingConfig, default_sampling
from llamagen.generation.engine import NativeEngine
from llamagen.generation.request import GenerationRequest
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError

RowCallback = Callable[[int, Tensor], None]
"""Called after each finished row of the grid with the number of finished rows and all codes so
far, (B, rows, columns) with the unfinished rows zero. An exception from it ends the generation.
"""


def generate_codes(
    model: Transformer,
    condition: Tensor,
    *,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    known: Tensor | None = None,
    window: int | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
    times: StepTimes | None = None,
) -> Tensor:
    """Generate one image's codes per row of ``condition``; see ``GenerationRequest``.

    ``condition`` are labels (B,) or text features (B, C, text_dim), real ones last, where
    ``condition_mask`` (B, C) is False for padding; ``unconditional`` are negative ones, by default
    with the same mask. Like ``seeds`` and ``known`` codes (B, rows, columns) they are one per
    image; all else is of all images. ``on_row`` is called after each finished row; ``times`` gets
    where the time goes. Returns codes (B, rows, columns) int64 on the model's device. InputError if
    arguments do not fit the model or each other, NotFiniteError if its logits are not finite.
    """
    model.cls_embedding.check(condition)
    images = len(condition)
    for name, given in (("seeds", seeds), ("negatives", unconditional), ("known codes", known)):
        if given is not None and len(given) != images:
            raise InputError(f"{len(given)} {name} for {images} images; give one per image")
    each: dict[str, Any] = {"condition": without_padding(condition, condition_mask), "seed": seeds}
    if unconditional is not None:
        mask = condition_mask if unconditional_mask is None else unconditional_mask
        each["negative"] = without_padding(unconditional, mask)
    if known is not None:
        each["known_codes"] = known
    of_all: dict[str, Any] = {
        "sampling": sampling or default_sampling(model.config),
        "window": window,
    }
    requests = [
        GenerationRequest(**{name: own[image] for name, own in each.items()}, **of_all)
        for image in range(images)
    ]
    on_progress = None if on_row is None else lambda at: on_row(at.row, at.codes)
    engine = NativeEngine(model, grid=grid, times=times)
    return engine.generate(requests, batch_size=max(1, images), on_progress=on_progress)


def without_padding(condition: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Split conditions into those of single images, without padding.

    Exact: padding is never attended to, and condition positions carry no position of their own
    (see ``rope_table``). Raises InputError if the mask has another shape than ``condition``, labels
    (B,) or text features (B, C, text_dim), or leaves nothing of an image's condition.
    """
    if mask is None:
        return list(condition)
    if condition.ndim < 3 or mask.shape != condition.shape[:2]:
        raise InputError(
            f"the condition mask has shape {tuple(mask.shape)}, "
            f"expected {tuple(condition.shape[:2])} like the text features"
        )
    mask = mask.to(condition.device, torch.bool)
    if not bool(mask.any(-1).all()):
        raise InputError(
            "the condition mask leaves no text feature of an image; each needs at least one"
        )
    return [features[kept] for features, kept in zip(condition, mask, strict=True)]
