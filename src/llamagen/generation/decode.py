"""The decode loop: condition in, codes out, with guidance and a KV cache.

Shapes: B images, C condition length, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.errors import InputError, NotFiniteError
from llamagen.generation.draws import Draws, draws_for
from llamagen.generation.seeds import uniform_draws
from llamagen.transformer import Transformer, decoder_for

RowCallback = Callable[[int, Tensor], None]
"""Called after each finished row of the grid with the number of finished rows and all codes so
far, (B, rows, columns) with the unfinished rows zero. An exception from it ends the generation.
"""


@torch.inference_mode()
def generate_codes(
    model: Transformer,
    condition: Tensor,
    *,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
) -> Tensor:
    """Draws one image's codes per row of ``condition``.

    The codes of an image depend on its own condition, seed and settings only (up to
    floating-point ties), not on what else is in the batch.

    Args:
        model: in eval mode, on the device and in the precision to compute in.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        seeds: one per image.
        sampling: how codes are drawn; by default ``SamplingConfig()``.
        condition_mask: (B, C) bool, False where text features are padding.
        unconditional: shaped like ``condition``, what guidance leads away from; by default the
            model's own "no class" or "no text".
        unconditional_mask: (B, C) bool, False where ``unconditional`` is padding; by default
            ``condition_mask``.
        grid: rows and columns; by default the model's.
        on_row: called after each finished row of the grid.

    Returns:
        (B, rows, columns) int64 codes on the model's device.

    Raises:
        InputError: condition, seeds or settings do not fit the model or each other.
        NotFiniteError: the model's logits are not finite.
    """
    sampling = sampling or SamplingConfig()
    rows, columns = grid or model.config.grid
    condition = condition.to(model.device)
    model.cls_embedding.check(condition)
    images = condition.shape[0]
    if len(seeds) != images:
        raise InputError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    guided = sampling.guided
    if guided:
        if unconditional is None:
            unconditional = model.cls_embedding.unconditional(condition)
        condition_mask = _both_masks(condition, condition_mask, unconditional_mask)
        condition = torch.cat([condition, unconditional.to(condition)])
    if condition_mask is not None:
        condition, condition_mask = _without_common_padding(
            condition, condition_mask.to(model.device)
        )
    length = condition.shape[1] if condition.ndim == 3 else 1
    cache = model.new_cache(condition.shape[0], condition_length=length, grid=(rows, columns))
    uniforms = uniform_draws(seeds, rows * columns).to(model.device)
    codes = torch.zeros(images, rows * columns, dtype=torch.int64, device=model.device)
    finite = torch.ones((), dtype=torch.bool, device=model.device)

    decoder = decoder_for(model, condition_mask=condition_mask)
    draw = _draws(model, sampling, images, guided)
    logits = model.prefill(condition, cache, condition_mask=condition_mask)
    for index in range(rows * columns):
        drawn, usable = draw(logits, logits, uniforms[:, index])
        finite &= usable.all()
        codes[:, index] = drawn
        if on_row is not None and (index + 1) % columns == 0:
            on_row((index + 1) // columns, codes.view(images, rows, columns))
        if guided and index + 1 == sampling.guidance_stop:
            guided, cache = False, cache.first_rows(images)
            draw = _draws(model, sampling, images, guided)
        if index + 1 < rows * columns:
            # Both rows of an image are fed its code, if there are two.
            logits = decoder.next_logits(drawn.repeat(cache.batch // images), cache)
    # Looked at once, at the end: a look at every step would wait for the device at every step.
    if not bool(finite):
        raise NotFiniteError(
            f"the transformer's logits are not finite in {model.dtype}; "
            f"use bfloat16 or float32, or check the weights"
        )
    return codes.view(images, rows, columns)


def _draws(model: Transformer, sampling: SamplingConfig, images: int, guided: bool) -> Draws:
    """Draws from the logits of all images, behind them those of their unconditional rows."""
    return draws_for(
        [sampling] * images,
        range(images),
        range(images, 2 * images) if guided else [None] * images,
        codebook_size=model.config.codebook_size,
        device=model.device,
    )


def _both_masks(
    condition: Tensor, mask: Tensor | None, unconditional_mask: Tensor | None
) -> Tensor | None:
    """The mask of the conditional rows above that of the unconditional ones."""
    if mask is None and unconditional_mask is None:
        return None
    if mask is None:
        mask = torch.ones(condition.shape[:2], dtype=torch.bool)
    other = mask if unconditional_mask is None else unconditional_mask
    for each in (mask, other):
        _check_mask(each, condition)
    return torch.cat([mask.bool().cpu(), other.bool().cpu()])


def _check_mask(mask: Tensor, condition: Tensor) -> None:
    if mask.shape != condition.shape[:2]:
        raise InputError(
            f"the condition mask has shape {tuple(mask.shape)}, "
            f"expected {tuple(condition.shape[:2])} like the text features"
        )


def _without_common_padding(condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cuts the padding that all rows share off the front of text features.

    Exact: padding is never attended to, and condition positions carry no position of their own
    (see ``rope_table``).
    """
    _check_mask(mask, condition)
    mask = mask.bool()
    used = max(1, int(mask.sum(-1).max()))
    mask = mask[:, -used:]
    return condition[:, -used:], None if bool(mask.all()) else mask
