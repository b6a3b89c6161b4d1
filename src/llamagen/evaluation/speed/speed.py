"""How long a model takes for an image on this machine, from a few steps of drawing one.

Shapes: codes (images, rows, columns) of the model's grid.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import llamagen.checkpoints as checkpoints
from llamagen.backends.decoder import decoder_for
from llamagen.checkpoints.info import dtype_name, is_text_encoder, path_of
from llamagen.checkpoints.sources import Source
from llamagen.config import SamplingConfig
from llamagen.evaluation.speed import machine, time_in_turn
from llamagen.generation import looking_ahead_pays, uniform_draws
from llamagen.generation.draws import draws_for
from llamagen.generation.memory import sampling_batch_size
from llamagen.generation.sequences import sequences_of
from llamagen.models.transformer import KVCache, Transformer
from llamagen.pipeline import Pipeline
from llamagen.support.devices import find_device, find_dtype
from llamagen.support.errors import InputError

BATCHES = (1, 8)
"""Numbers of images drawn at once that ``estimate_speed`` measures."""
_MOST_STEPS = 16
_REPEATS = 3
_SECONDS = 0.3
"""What a run of steps may take, and anything that is repeated."""
_LONG = 2.0
"""Seconds that measuring a batch may take where it can be told from one image instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedEstimate:
    """How fast so many images are drawn at once."""

    images: int
    seconds_per_code: float
    """For a code of every image, at the middle of the image."""
    start_seconds: float
    """For the condition of all images, which comes before the first code."""
    decode_seconds: float | None
    """For turning the codes of all images into pixels; None without an image tokenizer."""
    seconds_per_image: float
    images_per_minute: float
    looks_ahead: bool
    """Whether several codes per pass are drawn by default, which is faster than estimated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedSummary:
    """What ``estimate_speed`` found."""

    device: str
    dtype: str
    machine: dict[str, Any]
    """As ``bench.machine`` describes it."""
    estimates: tuple[SpeedEstimate, ...]
    """One per number of images, the smallest first."""
    how: str
    """How the times were estimated, in a few sentences."""


@torch.inference_mode()
def estimate_speed(
    source: Source,
    *,
    images: Sequence[int] = BATCHES,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> SpeedSummary:
    """Estimates how long an image takes, from a few steps of drawing it.

    Settings of sampling are the model's own. The text encoder is not loaded, and with text the
    condition is as long as it can be.

    Args:
        source: as for ``describe_model``, with a transformer in it.
        images: numbers of images drawn at once; fewer where there is no memory for as many.
        device: where to compute.
        dtype: precision of the weights; by default the one that images are drawn in.

    Raises:
        FileNotFoundError: a file of the model is missing.
        InputError: there is no such model, it draws no images, or it is a published one that is
            not on this machine; or there is no such device or precision.
    """
    if not images or min(images) < 1:
        raise InputError(f"images is {list(images)}, expected numbers of at least 1")
    where = find_device(device)
    precision = find_dtype(dtype, where)
    if is_text_encoder(Path(source).expanduser()):
        raise InputError(f"{source} is a text encoder, which draws no images; measure a pipeline")
    found = checkpoints.resolve_pipeline(source)
    for part in (found.transformer, found.tokenizer):
        if part is not None and path_of(part) is None:
            raise InputError(
                f"{part} is not on this machine, so it cannot be measured; draw an image with "
                f"{source} first, which downloads it"
            )
    decode = None
    if found.tokenizer is None:
        model = checkpoints.load_transformer(found.transformer, device=where, dtype=precision)
    else:
        pipe = Pipeline.from_pretrained(source, device=where, dtype=precision)
        model, decode = pipe.transformer, pipe.decode
    guided = found.sampling.guided
    most = sampling_batch_size(model, guided=guided)
    batches = sorted({min(number, most) for number in images})
    drawings = {number: _Drawing(model, number, found.sampling) for number in batches}
    grid = model.config.grid
    starts = _seconds_of_batches(lambda number: drawings[number].start(), batches)
    decodes = None
    if decode is not None:
        blank = {number: torch.zeros(number, *grid, dtype=torch.int64) for number in batches}
        decodes = _seconds_of_batches(lambda number: decode(blank[number]), batches)
    estimates = []
    for number in batches:
        per_code = drawings[number].seconds_per_code()
        decoding = None if decodes is None else decodes[number]
        whole = starts[number] + model.config.num_codes * per_code + (decoding or 0.0)
        estimates.append(
            SpeedEstimate(
                images=number,
                seconds_per_code=per_code,
                start_seconds=starts[number],
                decode_seconds=decoding,
                seconds_per_image=whole / number,
                images_per_minute=60 * number / whole,
                looks_ahead=looking_ahead_pays(model, number, found.sampling),
            )
        )
    return SpeedSummary(
        device=str(where),
        dtype=dtype_name(precision),
        machine=machine(),
        estimates=tuple(estimates),
        how=_how(model, found.sampling, estimates),
    )


class _Drawing:
    """Images that are half drawn. Their codes mean nothing: time does not depend on them."""

    def __init__(self, model: Transformer, images: int, sampling: SamplingConfig) -> None:
        config = model.config
        condition = torch.zeros(images, dtype=torch.int64)
        if config.condition == "text":
            condition = torch.zeros(images, config.text_length, config.text_dim)
        self._model, self._images = model, images
        self._sequences = sequences_of(model, condition, seeds=range(images), sampling=sampling)
        self._uniforms = uniform_draws(range(images), config.num_codes).to(model.device)
        self._decoder = decoder_for(model)
        self._draw = draws_for(
            [sampling] * images,
            range(images),
            range(images, 2 * images) if self._sequences.guided else [None] * images,
            codebook_size=config.codebook_size,
            device=model.device,
        )

    def start(self) -> KVCache:
        """Reads the conditions; returns the cache that is behind them."""
        condition = self._sequences.condition
        cache = self._model.new_cache(len(condition))
        self._decoder.start(condition, cache)
        return cache

    def seconds_per_code(self) -> float:
        """Of a code of every image, by a few steps from the middle of the images on."""
        config = self._model.config
        done = config.num_codes // 2
        condition = self._sequences.condition
        # Its condition is not read: that may take long, and the time of a step is the same.
        cache = self._model.new_cache(len(condition))
        for each in (*cache.keys, *cache.values):
            each.zero_()
        middle = config.condition_length + done

        def run(steps: int) -> None:
            cache.length = middle
            codes = torch.zeros(self._images, dtype=torch.int64, device=self._model.device)
            for index in range(done, done + steps):
                logits = self._decoder.next_logits(
                    codes.repeat(len(condition) // len(codes)), cache
                )
                codes, _ = self._draw(logits, logits, self._uniforms[:, index])

        once = time_in_turn({"step": lambda: run(1)}, repeats=1)["step"][0]
        steps = max(1, min(int(_SECONDS / once), _MOST_STEPS, config.num_codes - done))
        return _seconds(lambda: run(steps)) / steps


def _seconds(run: Callable[[], object]) -> float:
    """Of a call: the median of a few, or one where a call takes long."""
    once = time_in_turn({"run": run}, repeats=1)["run"][0]
    if once > _SECONDS:
        return once
    return statistics.median(time_in_turn({"run": run}, repeats=_REPEATS)["run"])


def _seconds_of_batches(run: Callable[[int], object], batches: Sequence[int]) -> dict[int, float]:
    """Of ``run`` for each number of images, told from the smallest one where that takes long."""
    smallest = batches[0]
    found = {smallest: _seconds(lambda: run(smallest))}
    for number in batches[1:]:
        likely = found[smallest] * number / smallest
        if likely > _LONG:
            found[number] = likely
        else:
            found[number] = _seconds(functools.partial(run, number))
    return found


def _how(model: Transformer, sampling: SamplingConfig, estimates: Sequence[SpeedEstimate]) -> str:
    config = model.config
    guidance = "with" if sampling.guided else "without"
    first = (
        f"ms/code: of a few codes drawn one by one in the middle of an image, {guidance} guidance, "
        f"each for all images at once; taken for all {config.num_codes} codes."
    )
    sentences = [first]
    if config.condition == "text":
        sentences.append(
            f"Added is a prompt of {config.text_length} tokens, the most there can be; the text "
            f"encoder is left out."
        )
    if estimates[0].decode_seconds is None:
        sentences.append("There is no image tokenizer, so its time is left out.")
    else:
        sentences.append("Added is the image tokenizer's time for whole images.")
    ahead = [str(each.images) for each in estimates if each.looks_ahead]
    if ahead:
        sentences.append(
            f"With {' or '.join(ahead)} at once, several codes are drawn per pass here by default, "
            f"which may be faster."
        )
    return " ".join(sentences)
