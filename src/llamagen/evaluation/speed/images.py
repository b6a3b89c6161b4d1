"""Seconds per image of a model on this machine, measured while it generates."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llamagen.checkpoints as checkpoints
from llamagen.checkpoints.info import dtype_name, is_text_encoder, path_of
from llamagen.checkpoints.sources import Source
from llamagen.config import SamplingConfig
from llamagen.evaluation.speed.limits import machine
from llamagen.generation import generate_codes
from llamagen.models.transformer import Transformer
from llamagen.pipeline import Pipeline
from llamagen.support.devices import find_device, find_dtype
from llamagen.support.errors import InputError

BATCHES = (1, 8)
"""Numbers of images at once that ``measure_speed`` measures."""
_SECONDS = 2.0
"""Generation ends with the first finished row of the grid after this time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of generating a number of images at once."""

    images: int
    seconds_per_code: float
    """Of all images at once: time until the last measured row, over the codes of one image."""
    codes: int
    """Codes of an image that were generated; if not all, the rest is taken to be as fast."""
    decode_seconds: float | None
    """Image tokenizer, all images; None without one."""
    seconds_per_image: float
    images_per_minute: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedSummary:
    """Result of ``measure_speed``."""

    device: str
    dtype: str
    machine: dict[str, Any]
    """See ``machine``."""
    estimates: tuple[Speed, ...]
    """One per number of images, the smallest first."""
    how: str
    """Explanation of the times, in a few sentences."""


@torch.inference_mode()
def measure_speed(
    source: Source,
    *,
    images: Sequence[int] = BATCHES,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> SpeedSummary:
    """Generate images for a few seconds, with the model's own sampling settings.

    The text encoder is not loaded; conditions of text have the maximum length.

    Args:
        source: as for ``describe_model``, with a transformer in it.
        images: numbers of images generated at once.
        device: where to compute.
        dtype: precision of the weights; by default the one that images are generated in.

    Raises:
        FileNotFoundError: a file of the model is missing.
        InputError: there is no such model, it generates no images, or it is a published one that
            is not on this machine; or there is no such device or precision.
    """
    if not images or min(images) < 1:
        raise InputError(f"images is {list(images)}, expected integers of at least 1")
    where = find_device(device)
    precision = find_dtype(dtype, where)
    if is_text_encoder(Path(source).expanduser()):
        raise InputError(
            f"{source} is a text encoder, which generates no images; measure a pipeline"
        )
    found = checkpoints.resolve_pipeline(source)
    for part in (found.transformer, found.tokenizer):
        if part is not None and path_of(part) is None:
            raise InputError(
                f"{part} is not on this machine, so it cannot be measured; generate an image with "
                f"{source} first, which downloads it"
            )
    model = checkpoints.load_transformer(found.transformer, device=where, dtype=precision)
    pipeline = None
    if found.tokenizer is not None:
        tokenizer = checkpoints.load_tokenizer(found.tokenizer, device=where, dtype=precision)
        pipeline = Pipeline(tokenizer, model)
    return SpeedSummary(
        device=str(where),
        dtype=dtype_name(precision),
        machine=machine(),
        estimates=tuple(
            _measure(model, pipeline, number, found.sampling) for number in sorted(set(images))
        ),
        how=_how(model, found.sampling, has_tokenizer=pipeline is not None),
    )


def _measure(
    model: Transformer, pipeline: Pipeline | None, images: int, sampling: SamplingConfig
) -> Speed:
    """Speed of some images at once. Their conditions are zeros, which changes no time."""
    config = model.config
    condition = torch.zeros(images, dtype=torch.int64)
    if config.condition == "text":
        condition = torch.zeros(images, config.text_length, config.text_dim)
    # In the first row, kernels are compiled and memory is allocated.
    _time_rows(model, condition, sampling, seconds=0.0)
    rows, seconds = _time_rows(model, condition, sampling, seconds=_SECONDS)
    codes = rows * config.grid[1]
    whole = seconds * config.num_codes / codes
    decode_seconds = None
    if pipeline is not None:
        blank = torch.zeros(images, *config.grid, dtype=torch.int64)
        start = time.perf_counter()
        pipeline.decode(blank)
        decode_seconds = time.perf_counter() - start
        whole += decode_seconds
    return Speed(
        images=images,
        seconds_per_code=seconds / codes,
        codes=codes,
        decode_seconds=decode_seconds,
        seconds_per_image=whole / images,
        images_per_minute=60 * images / whole,
    )


class _EnoughError(Exception):
    """Ends a generation."""


def _time_rows(
    model: Transformer, condition: Tensor, sampling: SamplingConfig, *, seconds: float
) -> tuple[int, float]:
    """Generate until the first finished row after ``seconds``; return rows, and their time."""
    rows, taken = 0, 0.0
    start = time.perf_counter()

    def on_row(row: int, codes: Tensor) -> None:
        nonlocal rows, taken
        codes[:, row - 1].cpu()  # a device may still compute them
        rows, taken = row, time.perf_counter() - start
        if taken > seconds:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        generate_codes(
            model, condition, seeds=range(len(condition)), sampling=sampling, on_row=on_row
        )
    return rows, taken


def _how(model: Transformer, sampling: SamplingConfig, *, has_tokenizer: bool) -> str:
    config = model.config
    guidance = "with" if sampling.guided else "without"
    how = (
        f"ms/code: time {guidance} guidance, for all images at once, over the {config.num_codes} "
        f"codes of an image; of a slow model only the first rows are generated."
    )
    if config.condition == "text":
        how += (
            f" The prompt has {config.text_length} tokens, the maximum; the text encoder is left "
            f"out."
        )
    if has_tokenizer:
        return f"{how} Added is the image tokenizer's time for whole images."
    return f"{how} There is no image tokenizer, so its time is left out."
