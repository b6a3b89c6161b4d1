"""The decode loop: condition in, codes out, with guidance and a KV cache.

Shapes: B images, C condition length, V codes of the codebook.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llamagen.backends.decoder import Decoder, StepTimes, decoder_for
from llamagen.config import Grid, SamplingConfig
from llamagen.generation.draws import Draws, draws_for
from llamagen.generation.known import start_codes
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.sequences import Blend, sequences_of
from llamagen.models.transformer import KVCache, Transformer
from llamagen.support.errors import NotFiniteError

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
    known: Tensor | None = None,
    blend: Blend | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
    times: StepTimes | None = None,
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
        known: (B, rows, columns) codes that stay as they are, -1 where one is to be drawn. Of an
            image whose first codes are those that its seed draws, the rest are too.
        blend: a second condition of each image.
        grid: rows and columns; by default the model's.
        on_row: called after each finished row of the grid.
        times: where the time goes is added to it.

    Returns:
        (B, rows, columns) int64 codes on the model's device.

    Raises:
        InputError: condition, seeds, known codes or settings do not fit the model or each other.
        NotFiniteError: the model's logits are not finite.
    """
    sampling = sampling or SamplingConfig()
    rows, columns = grid or model.config.grid
    total = rows * columns
    sequences = sequences_of(
        model,
        condition,
        seeds=seeds,
        sampling=sampling,
        condition_mask=condition_mask,
        unconditional=unconditional,
        unconditional_mask=unconditional_mask,
        blend=blend,
    )
    images, condition, condition_mask, guided = sequences
    length = condition.shape[1] if condition.ndim == 3 else 1
    cache = model.new_cache(condition.shape[0], condition_length=length, grid=(rows, columns))
    uniforms = uniform_draws(seeds, total).to(model.device)
    codes, given = start_codes(
        known, (images, rows, columns), model.config.codebook_size, model.device
    )
    finite = torch.ones((), dtype=torch.bool, device=model.device)

    decoder = decoder_for(model, condition_mask=condition_mask, times=times)
    draw = _draws(model, sampling, images, guided)
    logits = decoder.start(condition, cache, condition_mask=condition_mask)
    fed = 0
    for index in range(total):
        if guided and index == sampling.guidance_stop:
            guided, cache = False, cache.first_rows(cache.batch - images)
            draw = _draws(model, sampling, images, guided)
        if not given[index].all:
            if fed < index:
                # All rows of an image are fed its codes.
                logits = _feed(decoder, codes[:, fed:index], cache)
                fed = index
            start = time.perf_counter()
            # Without guidance the last rows are looked at by nobody.
            drawn, usable = draw(
                _conditional(logits, images, blend), logits[-images:], uniforms[:, index]
            )
            if times is not None:
                times.drawing += time.perf_counter() - start
            finite &= usable.all()
            if given[index].any:
                drawn = torch.where(codes[:, index] < 0, drawn, codes[:, index])
            codes[:, index] = drawn
        if on_row is not None and (index + 1) % columns == 0:
            shown = codes if known is None else _up_to(codes, index + 1)
            on_row((index + 1) // columns, shown.view(images, rows, columns))
    # Looked at once, at the end: a look at every step would wait for the device at every step.
    check_finite(finite, model)
    return codes.view(images, rows, columns)


def _feed(decoder: Decoder, codes: Tensor, cache: KVCache) -> Tensor:
    """Logits (R, V) behind ``codes`` (B, T), which all sequences of an image are fed."""
    codes = codes.repeat(cache.batch // len(codes), 1)
    if codes.shape[1] == 1:
        return decoder.next_logits(codes[:, 0], cache)
    return decoder.feed(codes, cache)


def _conditional(logits: Tensor, images: int, blend: Blend | None) -> Tensor:
    """Logits (B, V) of what is asked for, from those of all sequences (R, V)."""
    own = logits[:images]
    if blend is None:
        return own
    return own.float().lerp(logits[images : 2 * images].float(), blend.share)


def _up_to(codes: Tensor, count: int) -> Tensor:
    """Codes (B, T) of which all but the first ``count`` are zero."""
    shown = codes.clone()
    shown[:, count:] = 0
    return shown


def check_finite(finite: Tensor, model: Transformer) -> None:
    """Raises NotFiniteError unless ``finite`` () is True. Waits for the device."""
    if not bool(finite):
        raise not_finite(model)


def not_finite(model: Transformer) -> NotFiniteError:
    """What is raised where a model's logits are not finite."""
    return NotFiniteError(
        f"the transformer's logits are not finite in {model.dtype}; "
        f"use bfloat16 or float32, or check the weights"
    )


def _draws(model: Transformer, sampling: SamplingConfig, images: int, guided: bool) -> Draws:
    """Draws from the logits of all images, and of as many unconditional rows."""
    return draws_for(
        [sampling] * images,
        range(images),
        range(images) if guided else [None] * images,
        codebook_size=model.config.codebook_size,
        device=model.device,
    )
