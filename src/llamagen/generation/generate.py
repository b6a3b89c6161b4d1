"""``generate_codes``: the layer below the pipeline, for batches given as tensors.

Shapes: B images, C condition length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llamagen.backends import StepTimes
from llamagen.config import Grid, SamplingConfig
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
    """Generate one image's codes per row of ``condition``.

    The codes of an image depend on its own condition, seed and settings only (up to
    floating-point ties), not on what else is in the batch.

    Args:
        model: in eval mode, on the device and in the precision to compute in.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        seeds: one per image.
        sampling: how codes are sampled; by default ``SamplingConfig()``.
        condition_mask: (B, C) bool, False where text features are padding.
        unconditional: like ``condition``, what guidance leads away from; by default the model's
            own "no class" or "no text".
        unconditional_mask: (B, C) bool, False where ``unconditional`` is padding; by default
            ``condition_mask``.
        known: (B, rows, columns) codes that stay as they are, -1 where one is to be sampled. Of
            an image whose first codes are those that its seed samples, the rest are too.
        window: codes that a forward pass looks at; see ``GenerationRequest``.
        grid: rows and columns; by default the model's.
        on_row: called after each finished row of the grid.
        times: where the time goes is added to it.

    Returns:
        (B, rows, columns) int64 codes on the model's device.

    Raises:
        InputError: condition, seeds, known codes or settings do not fit the model or each other.
        NotFiniteError: the model's logits are not finite.
    """
    model.cls_embedding.check(condition)
    images = len(condition)
    if len(seeds) != images:
        raise InputError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    if known is not None and len(known) != images:
        raise InputError(
            f"known codes have shape {tuple(known.shape)}, expected those of {images} images"
        )
    if unconditional is not None and len(unconditional) != images:
        raise InputError(
            f"{len(unconditional)} negative conditions for {images} images; give one per image"
        )
    conditions = without_padding(condition, condition_mask)
    negatives: Sequence[Tensor | None] = [None] * images
    if unconditional is not None:
        mask = condition_mask if unconditional_mask is None else unconditional_mask
        negatives = without_padding(unconditional, mask)
    requests = [
        GenerationRequest(
            condition=conditions[image],
            seed=seeds[image],
            sampling=sampling or SamplingConfig(),
            negative=negatives[image],
            known_codes=None if known is None else known[image],
            window=window,
        )
        for image in range(images)
    ]
    engine = NativeEngine(model, grid=grid)
    return engine.generate(
        requests,
        batch_size=max(1, images),
        on_progress=None if on_row is None else lambda at: on_row(at.row, at.codes),
        times=times,
    )


def without_padding(condition: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Split conditions into those of single images, without padding.

    Exact: padding is never attended to, and condition positions carry no position of their own
    (see ``rope_table``).

    Args:
        condition: labels (B,) or text features (B, C, text_dim).
        mask: (B, C), False or 0 where text features are padding; None if none are.

    Raises:
        InputError: the mask has another shape, or leaves nothing of an image's condition.
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
